"""What SemCKD does between CNNs: decoders, matched weights, a spared last layer; by oracles written from the text."""

import itertools

import numpy as np
import pytest
import torch
from naive import batch_normalize, convolve, normal, pool, relative
from scipy import optimize, special
from torch import nn

from hf_semckd.config import SemCKDConfig
from hf_semckd.errors import ConfigurationError
from hf_semckd.features.layers import FeatureSpec
from hf_semckd.losses import SemCKDLoss
from hf_semckd.losses.semckd.projection import FeatureDecoder
from hf_semckd.losses.semckd.sinkhorn import sinkhorn_weights
from hf_semckd.training.options import loss_options

STUDENT = [(4, 9, 9), (5, 5, 4), (6, 2, 2)]
TEACHER = [(7, 9, 9), (8, 4, 5), (7, 3, 3)]
BATCH = 6


def specs(shapes):
    return [FeatureSpec.from_shape(shape, str(number)) for number, shape in enumerate(shapes)]


def configured(tmp_path, student=STUDENT, teacher=TEACHER, **arguments):
    """Return the loss that a trainer would make."""
    torch.manual_seed(3)
    config = SemCKDConfig(str(tmp_path), use_cpu=True, report_to="none", **arguments)
    return SemCKDLoss.for_layers(specs(student), specs(teacher), loss_options(config)).double()


def features(shapes, seed, batch=BATCH):
    return [normal(batch, *shape, seed=seed + index) for index, shape in enumerate(shapes)]


def limited(maps, limit=8):
    return pool(maps, tuple(min(side, limit) for side in maps.shape[2:]))


def decoded_by_hand(maps, decoder):
    maps = batch_normalize(convolve(maps, decoder[0].weight), decoder[1]).clamp(min=0)
    return batch_normalize(convolve(maps, decoder[3].weight), decoder[4]).clamp(min=0)


def errors_by_hand(loss, student, teacher, compared):
    """Compute the mean squared error of every sample and pair (B, S', T), targets in units of their own batch."""
    found = torch.zeros(len(student[0]), compared, len(teacher), dtype=torch.float64)
    for s, t in itertools.product(range(compared), range(len(teacher))):
        own, theirs = limited(student[s]), limited(teacher[t])
        size = tuple(min(a, b) for a, b in zip(own.shape[2:], theirs.shape[2:], strict=True))
        linear = loss.projection[s][str(theirs.shape[1])]
        read = pool(decoded_by_hand(own, loss.decoder[s]), size)
        projected = convolve(read, linear.weight[:, :, None, None]) + linear.bias[:, None, None]
        variance = theirs.var((0, 2, 3), unbiased=False)
        typical, count = variance.mean(), theirs.numel() / theirs.shape[1]
        scale = ((count * variance + 256 * typical) / (count + 256) + 1e-5 * typical).rsqrt()
        standard = (theirs - theirs.mean((0, 2, 3))[:, None, None]) * scale[:, None, None]
        found[:, s, t] = ((projected - pool(standard, size)) ** 2).mean((1, 2, 3))
    return found


# ---- The whole -----------------------------------------------------------------------------------------------------


def divergence_by_hand(weights):
    return (weights * (weights * weights.shape[2]).log()).sum(2)


@pytest.mark.parametrize("association", [None, "similarity", "sinkhorn", "uniform", "one_to_one", "learned"])
def test_the_loss_by_hand(tmp_path, association):
    loss = configured(tmp_path, association=association)
    student, teacher = features(STUDENT, 1), features(TEACHER, 20)
    out = loss(student, teacher)
    errors = errors_by_hand(loss, student, teacher, compared=2)
    assert relative(out.errors[:, :2], errors) < 1e-9 and bool(out.errors[:, 2].isnan().all())
    expected = (out.association[:, :2] * errors).sum((1, 2)) / 2
    if association == "learned":
        assert torch.equal(out.association[:, 2], torch.full((BATCH, 3), 1 / 3, dtype=torch.float64))
        expected = expected + 0.5 * divergence_by_hand(out.association[:, :2]).mean(1)
    assert relative(out.per_sample, expected) < 1e-9 and relative(out.total, expected.mean()) < 1e-9


def test_the_defaults(tmp_path):
    loss = configured(tmp_path)
    assert (loss.projector, loss.association.name, loss.compared) == ("convolutional", "sinkhorn", 2)
    assert (loss.relation_weight, loss.default_weight, loss.association.temperature) == (0.0, 100.0, 0.02)
    assert loss.settings == {
        "association": "sinkhorn", "association_temperature": 0.02, "relation_weight": 0.0,
        "projector": "convolutional", "projection_init": "random", "max_grid": 8,
    }  # fmt: skip


@pytest.mark.parametrize("association", [None, "learned"])
def test_every_parameter_is_trained_and_the_student_where_it_is_compared(tmp_path, association):
    loss = configured(tmp_path, association=association)
    student = [x.requires_grad_() for x in features(STUDENT, 1)]
    loss(student, features(TEACHER, 20)).total.backward()
    assert all(entry.grad is not None and entry.grad.abs().sum() > 0 for entry in loss.parameters())
    assert [x.grad is not None for x in student] == [True, True, False]


def test_relations_teach_the_spared_layer_too(tmp_path):
    plain, related = configured(tmp_path), configured(tmp_path, relation_weight=5.0)
    student = [x.requires_grad_() for x in features(STUDENT, 1)]
    teacher = features(TEACHER, 20)
    added = related(student, teacher).per_sample - plain(student, teacher).per_sample
    assert bool((added > 0).all())
    added.sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in student)


@pytest.mark.parametrize(
    ("arguments", "compared"),
    [
        ({}, 2),
        ({"student_layers": [1, 2, 3]}, 3),
        ({"association": "last"}, 3),
        ({"logit_weight": 0.0}, 3),
        ({"projector": "shared"}, 3),
        ({"projector": "pairwise", "association": "uniform"}, 3),
    ],
)
def test_which_layers_are_compared(tmp_path, arguments, compared):
    loss = configured(tmp_path, **arguments)
    assert loss.compared == compared
    out = loss(features(STUDENT, 1), features(TEACHER, 20))
    assert int(out.errors.isfinite().all(0).all(1).sum()) == compared and bool(out.total.isfinite())


def test_one_layer_alone_is_compared(tmp_path):
    assert configured(tmp_path, STUDENT[:1]).compared == 1


def test_a_linear_projection_has_the_weight_that_suits_it(tmp_path):
    loss = configured(tmp_path, projector="shared")
    assert (loss.default_weight, loss.relation_weight, loss.association.name) == (3.0, 20.0, "similarity")
    assert not len(loss.decoder)


def test_a_batch_of_one_and_single_cells_will_do(tmp_path):
    shapes = [(3, 1, 1), (4, 1, 1)]
    loss = configured(tmp_path, shapes, [(5, 1, 1)])
    assert bool(loss(features(shapes, 1, batch=1), features([(5, 1, 1)], 9, batch=1)).total.isfinite())


def test_what_a_checkpoint_holds_restores_the_loss(tmp_path):
    loss, student, teacher = configured(tmp_path), features(STUDENT, 1), features(TEACHER, 20)
    loss(student, teacher)
    torch.manual_seed(99)
    other = SemCKDLoss.for_layers(
        specs(STUDENT), specs(TEACHER), loss_options(SemCKDConfig(str(tmp_path), use_cpu=True))
    ).double()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.eval()(student, teacher).total, loss.eval()(student, teacher).total)


# ---- What does not fit ---------------------------------------------------------------------------------------------


def refusal(**arguments):
    with pytest.raises(ConfigurationError) as caught:
        SemCKDLoss(**{"student_shapes": STUDENT, "teacher_shapes": TEACHER, **arguments})
    assert all(part in str(caught.value) for part in ("received: ", "expected: ", "what to do: "))
    return str(caught.value)


def test_convolutions_are_for_maps():
    text = refusal(student_shapes=[(9, 4)], teacher_shapes=[(9, 5)], projector="convolutional")
    assert "tokens" in text and "projector='shared'" in text


def test_patches_that_meet_another_grid_are_maps():
    patches = [FeatureSpec("p", "tokens", 6, 10, (3, 3), 1)]
    loss = SemCKDLoss(patches, TEACHER, projector="convolutional").double()
    assert bool(loss([normal(BATCH, 10, 6)], features(TEACHER, 20)).total.isfinite())


@pytest.mark.parametrize("spared", [-1, 3, 4])
def test_no_more_layers_can_be_spared_than_there_are_others(spared):
    assert f"spared_layers={spared} of 3 layers" in refusal(spared_layers=spared)


@pytest.mark.parametrize("arguments", [{"projector": "pairwise"}, {"association": "last"}])
def test_these_forms_spare_no_layer(arguments):
    assert "a number from 0 to 0" in refusal(spared_layers=1, **arguments)


# ---- Decoders ------------------------------------------------------------------------------------------------------


def test_a_decoder_by_hand():
    torch.manual_seed(0)
    decoder = FeatureDecoder(3, 5).double()
    maps = normal(4, 3, 6, 5)
    assert relative(decoder(maps), decoded_by_hand(maps, decoder)) < 1e-12


def test_a_decoder_takes_a_single_position():
    decoder = FeatureDecoder(3, 5)
    assert decoder(torch.randn(1, 3, 1, 1)).shape == (1, 5, 1, 1)
    assert all(torch.equal(m.running_mean, torch.zeros(5)) for m in decoder if isinstance(m, nn.BatchNorm2d))


# ---- Matched weights -----------------------------------------------------------------------------------------------


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
def test_matched_weights_are_the_best_within_the_bound(layers, teachers, seed):
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
