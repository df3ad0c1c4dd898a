"""Association weights against numpy, naive loops and a numerical minimizer."""

import itertools

import numpy as np
import pytest
import torch
from naive import normal
from scipy import optimize, special

from hf_semckd.features.geometry import Average, summary
from hf_semckd.features.layers import FeatureSpec
from hf_semckd.losses.semckd.association import (
    SimilarityAssociation,
    bound_of_cosine_weights,
    fixed_weights,
    kl_to_uniform,
    product_weights,
)

# A batch of one.
ONE = torch.zeros(1, dtype=torch.float64)


def text(channels, length):
    return FeatureSpec("text", "tokens", channels, length)


def test_product_weights_are_the_softmax_of_scaled_products():
    query, key = [normal(4, 3, seed=s) for s in range(2)], [normal(4, 3, seed=10 + t) for t in range(5)]
    actual = product_weights(query, key, 1.7)
    logits = np.array([[[1.7 * float(query[s][i] @ key[t][i]) for t in range(5)] for s in range(2)] for i in range(4)])
    np.testing.assert_allclose(actual, special.softmax(logits, axis=2), rtol=1e-12)


def test_similarity_weights_are_the_softmax_of_row_correlations():
    student, teacher = [normal(6, 4, seed=s) for s in range(2)], [normal(6, 5, seed=9 + t) for t in range(3)]

    def cosines(rows):
        rows = rows.numpy() / np.linalg.norm(rows.numpy(), axis=1, keepdims=True)
        return rows @ rows.T

    expected = np.empty((6, 2, 3))
    for i, s, t in np.ndindex(6, 2, 3):
        expected[i, s, t] = np.corrcoef(cosines(student[s])[i], cosines(teacher[t])[i])[0, 1]
    actual = SimilarityAssociation(0.2).of_summaries(student, teacher)
    np.testing.assert_allclose(actual, special.softmax(expected / 0.2, axis=2), rtol=1e-10)


def test_similarity_weights_follow_a_permutation_of_the_batch():
    student, teacher = [normal(7, 4, seed=s) for s in range(2)], [normal(7, 5, seed=9 + t) for t in range(3)]
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    expected = SimilarityAssociation(0.2).of_summaries(student, teacher)[order]
    actual = SimilarityAssociation(0.2).of_summaries([x[order] for x in student], [x[order] for x in teacher])
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)
    assert (expected - expected[torch.arange(7).roll(1)]).abs().max() > 0.01


def test_similarity_weights_of_one_sample_are_uniform():
    weights = SimilarityAssociation(0.2).of_summaries([normal(1, 4)] * 2, [normal(1, 5, seed=t) for t in range(4)])
    assert weights.tolist() == [[[0.25] * 4] * 2]


def test_similarity_weights_of_equal_samples_are_nearly_uniform():
    student = [normal(1, 40, seed=s, dtype=torch.float32).repeat(9, 1) for s in range(2)]
    teacher = [normal(1, 50, seed=5 + t, dtype=torch.float32).repeat(9, 1) for t in range(4)]
    weights = SimilarityAssociation(0.2).of_summaries(student, teacher)
    np.testing.assert_allclose(weights, 0.25, atol=0.1)


def test_similarity_weights_do_not_depend_on_scale_or_rotation_of_a_layer():
    student, teacher = [normal(6, 4)], [normal(6, 5, seed=1), normal(6, 5, seed=2)]
    rotation = torch.linalg.qr(normal(5, 5, seed=3)).Q
    expected = SimilarityAssociation(0.2).of_summaries(student, teacher)
    actual = SimilarityAssociation(0.2).of_summaries([student[0] * 100], [teacher[0] @ rotation, teacher[1] * 0.01])
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_similarity_weights_prefer_the_teacher_layer_that_sees_the_samples_alike():
    signal = normal(16, 8)
    weights = SimilarityAssociation(0.2).of_summaries([signal @ normal(8, 8, seed=5)], [normal(16, 8, seed=6), signal])
    assert weights.mean(0)[0].argmax() == 1


@pytest.mark.parametrize("extra", [1, 7])
def test_similarity_weights_of_text_do_not_change_with_padding(extra):
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    layers = [normal(4, 3, 5, seed=s) for s in range(4)]

    def weights(layers, mask):
        rows = [summary(layer, text(5, layer.shape[1]), Average(mask)) for layer in layers]
        return SimilarityAssociation(0.2).of_summaries(rows[:2], rows[2:])

    padded = [torch.cat([layer, torch.full((4, extra, 5), float("nan"))], 1) for layer in layers]
    wider = torch.cat([mask, torch.zeros(4, extra, dtype=mask.dtype)], 1)
    torch.testing.assert_close(weights(padded, wider), weights(layers, mask), rtol=1e-11, atol=1e-13)


def test_similarity_weights_carry_no_gradient():
    student = normal(4, 3).requires_grad_()
    assert not SimilarityAssociation(0.2).of_summaries([student], [normal(4, 3, seed=1)]).requires_grad


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (5, 2), (3, 3)])
@pytest.mark.parametrize("kind", ["uniform", "last", "one_to_one"])
def test_fixed_weights_are_distributions_over_teacher_layers(kind, shape):
    weights = fixed_weights(kind, *shape, ONE)[0]
    sums = weights.sum(1).tolist()
    assert weights.shape == shape and (weights >= 0).all()
    assert sums == ([0.0] * (shape[0] - 1) + [1.0] if kind == "last" else pytest.approx([1.0] * shape[0]))


def test_uniform_weights_are_equal_and_last_has_one_entry():
    assert fixed_weights("uniform", 2, 4, ONE)[0].tolist() == [[0.25] * 4] * 2
    assert fixed_weights("last", 2, 3, ONE)[0].tolist() == [[0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("students", "teachers", "expected"),
    [
        (3, 3, [0, 1, 2]),
        (2, 4, [1, 3]),
        (6, 12, [1, 3, 5, 7, 9, 11]),
        (4, 12, [2, 5, 8, 11]),
        (3, 4, [1, 2, 3]),
        (4, 2, [0, 0, 1, 1]),
        (4, 3, [0, 1, 2, 2]),
        (1, 5, [4]),
        (5, 1, [0] * 5),
    ],
)
def test_one_to_one_maps_each_student_layer_to_the_teacher_layer_of_its_depth(students, teachers, expected):
    weights = fixed_weights("one_to_one", students, teachers, ONE)[0]
    assert weights.argmax(1).tolist() == expected
    assert weights.sum(1).tolist() == [1.0] * students


def test_one_to_one_is_the_identity_for_equal_depths_and_never_goes_back():
    for students, teachers in itertools.product(range(1, 14), repeat=2):
        chosen = fixed_weights("one_to_one", students, teachers, ONE)[0].argmax(1).tolist()
        assert chosen == sorted(chosen) and chosen[-1] == teachers - 1
        assert students != teachers or chosen == list(range(teachers))
        assert len(set(chosen)) == min(students, teachers)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("teachers", [1, 2, 3, 4])
def test_bound_of_cosine_weights_is_the_largest_weight_of_any_cosines(temperature, teachers):
    cosines = np.array(list(itertools.product(np.linspace(-1, 1, 9), repeat=teachers)))
    largest = special.softmax(cosines / temperature, axis=1).max()
    assert bound_of_cosine_weights(temperature, teachers) == pytest.approx(largest, rel=1e-12)


def test_bound_of_cosine_weights_agrees_with_the_measured_traps():
    assert bound_of_cosine_weights(1.0, 3) == pytest.approx(0.79, abs=0.005)
    assert bound_of_cosine_weights(1.0, 12) == pytest.approx(0.40, abs=0.005)


def test_free_energy_is_temperature_times_the_divergence_from_uniform():
    weights = torch.softmax(normal(3, 2, 5) * 2, -1)
    expected = 0.7 * special.rel_entr(weights.numpy(), np.full(5, 0.2)).sum(-1)
    np.testing.assert_allclose(kl_to_uniform(weights, 0.7), expected, rtol=1e-12)
    assert kl_to_uniform(torch.full((1, 1, 4), 0.25), 0.7).abs().max() < 1e-6
    assert kl_to_uniform(torch.tensor([[[1.0, 0.0]]]), 1.0).isfinite().all()


def minimizer(errors, temperature):
    """Return the minimum over the simplex of the weighted error plus `kl_to_uniform`, found numerically."""

    def objective(weights):
        restraint = kl_to_uniform(torch.from_numpy(weights), temperature)
        return float(weights @ errors + restraint.item())

    start = np.full(len(errors), 1 / len(errors))
    found = optimize.minimize(
        objective,
        start,
        method="SLSQP",
        bounds=[(1e-12, 1)] * len(errors),
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success
    return found.x


@pytest.mark.parametrize("temperature", [0.2, 0.5, 2.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_minimum_of_the_free_energy_is_the_gibbs_distribution(temperature, seed):
    errors = np.random.default_rng(seed).uniform(0, 1.5, size=4)
    found = minimizer(errors, temperature)
    np.testing.assert_allclose(found, special.softmax(-errors / temperature), atol=2e-5)


@pytest.mark.parametrize("temperature", [0.2, 0.5, 2.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_weight_at_the_minimum_is_below_the_bound(temperature, seed):
    errors = np.random.default_rng(seed).uniform(0, 1.5, size=4)
    bound = np.exp(-(errors.max() - errors.min()) / temperature) / len(errors)
    assert minimizer(errors, temperature).min() >= bound
    assert bound > 0
