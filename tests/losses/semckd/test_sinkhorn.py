"""Weights under a bound on each teacher layer, against the dual of their optimization problem."""

import numpy as np
import pytest
import torch
from naive import normal
from scipy import optimize, special

from hf_semckd.losses.semckd.sinkhorn import sinkhorn_weights


def best_by_search(scores):
    """Maximize sum w * scores + entropy over rows that add up to 1 and columns within the bound, by its dual.

    With prices v >= 0 on the columns, w = softmax(scores - v), where v minimizes sum_s logsumexp(scores_s - v) + bound
    * sum v: convex, and searched by a general method.
    """
    bound = max(1.0, len(scores) / scores.shape[1])

    def cost(prices):
        return special.logsumexp(scores - prices, axis=1).sum() + bound * prices.sum()

    def slope(prices):
        return bound - special.softmax(scores - prices, axis=1).sum(0)

    count = scores.shape[1]
    found = optimize.minimize(
        cost,
        np.zeros(count),
        jac=slope,
        bounds=[(0, None)] * count,
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-9},
    )
    weights = special.softmax(scores - found.x, axis=1)
    assert weights.sum(0).max() < bound + 1e-5
    return weights


@pytest.mark.parametrize(("layers", "teachers"), [(1, 3), (2, 2), (3, 3), (2, 5), (4, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_sinkhorn_weights_are_the_best_within_the_bound(layers, teachers, seed):
    scores = 2 * normal(2, layers, teachers, seed=seed)
    # All want the first one.
    scores[:, :, 0] += 2
    found = sinkhorn_weights(scores, rounds=500)
    for sample in range(2):
        np.testing.assert_allclose(found[sample].numpy(), best_by_search(scores[sample].numpy()), atol=2e-4)


@pytest.mark.parametrize("layers", [2, 3, 4])
@pytest.mark.parametrize("gap", [0.1, 0.5, 1.0])
def test_the_rounds_suffice_where_all_want_one_layer(layers, gap):
    cosines = 0.05 * torch.rand(16, layers, layers, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cosines[:, :, 0] += gap
    found = sinkhorn_weights(cosines / 0.02)
    assert float(found.sum(1).max()) < 1.01
    np.testing.assert_allclose(found[0].numpy(), best_by_search(cosines[0].numpy() / 0.02), atol=0.02)


def test_a_layer_that_all_resemble_is_shared_out():
    # Cosines of a small ResNet and its teacher: the second student layer too is most like the first teacher layer.
    cosines = torch.tensor([[[0.85, 0.65, 0.65], [0.87, 0.77, 0.77], [0.76, 0.76, 0.86]]])
    assert (cosines / 0.02).softmax(-1)[0].argmax(-1).tolist() == [0, 0, 2]
    found = sinkhorn_weights(cosines / 0.02)
    assert found[0].argmax(-1).tolist() == [0, 1, 2]
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 3))
    assert float(found.sum(1).max()) < 1.1


def test_a_layer_that_nobody_resembles_gets_nothing():
    cosines = torch.tensor([[[0.85, 0.0, 0.65, 0.65], [0.87, 0.0, 0.77, 0.77], [0.76, 0.0, 0.76, 0.86]]])
    assert float(sinkhorn_weights(cosines / 0.02)[..., 1].max()) < 1e-6


def test_where_nothing_is_wanted_too_much_the_softmax_stays():
    scores = normal(5, 2, 8)
    plain = scores.softmax(-1)
    free = plain.sum(1).max(-1).values <= 1
    assert bool(free.any())
    torch.testing.assert_close(sinkhorn_weights(scores)[free], plain[free])


def test_extreme_scores_stay_finite():
    scores = torch.tensor([[[1e4, -1e4], [1e4, -1e4]], [[0.0, 0.0], [0.0, 0.0]]])
    found = sinkhorn_weights(scores)
    assert bool(found.isfinite().all()) and torch.allclose(found.sum(-1), torch.ones(2, 2))
    torch.testing.assert_close(found[1], torch.full((2, 2), 0.5))
