"""Regressions of the teacher's layers against loops over layers, samples, positions and channels."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from embedding_cases import MASK as PKD_MASK
from embedding_cases import shape_of
from kept import named
from layer_cases import (
    MASK,
    PAIRED,
    SCENARIOS,
    B,
    RegressionCases,
    features_of,
    met,
    normal,
)
from torch import nn

from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.features.layers import FeatureSpec
from hf_semckd.losses.regression import FitNetLoss, LayerMapLoss, PKDLoss, VIDLoss

METHODS = [FitNetLoss, LayerMapLoss, VIDLoss]


def problem(method, scenario, **options):
    """Return a loss, features of both models, and the masks of both."""
    students, teachers, own, theirs, aligned = SCENARIOS[scenario]
    torch.manual_seed(0)
    loss = method(students, teachers, tokens_aligned=aligned, **options).double()
    for s, gaussian in enumerate(loss.gaussian if method is VIDLoss else ()):
        # Equal variances would not tell channels apart.
        gaussian.raw_variance.data += normal(len(gaussian.raw_variance), seed=70 + s)
    return loss, features_of(students, 0), features_of(teachers, 50), own, theirs


@pytest.mark.parametrize(("method", "weight"), zip(METHODS, (100.0, 1.0, 1.0), strict=True))
def test_the_published_weight_is_the_default(method, weight):
    assert method.default_weight == weight


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_student_and_the_parameters_and_not_the_teacher(method, scenario):
    loss, student, teacher, own, theirs = problem(method, scenario)
    for feature in [*student, *teacher]:
        feature.requires_grad_()
    loss(student, teacher, own, theirs).total.backward()
    compared = [len(student) // 2] if method is FitNetLoss else range(len(student))
    assert all((feature.grad is not None) == (s in compared) for s, feature in enumerate(student))
    assert all(student[s].grad.abs().sum() > 0 for s in compared)
    assert all(entry.grad is not None and entry.grad.abs().sum() > 0 for entry in loss.parameters())
    assert len(list(loss.parameters())) == (4 if method is VIDLoss else 2) * len(compared)
    assert all(feature.grad is None for feature in teacher)


@pytest.mark.parametrize(("method", "used"), zip(METHODS, ([1], [1, 2], [1, 2]), strict=True))
def test_of_the_teacher_only_the_used_layers_are_kept(method, used):
    loss, student, teacher, own, theirs = problem(method, "text")
    kept = loss.select(teacher, theirs)
    assert set(named(kept)) == {*(f"whole.{t}" for t in used), "mask"}
    assert torch.equal(loss(student, kept, own).per_sample, loss(student, teacher, own, theirs).per_sample)


@pytest.mark.parametrize("method", METHODS)
def test_no_layer_is_refused(method):
    with pytest.raises(InputError, match="no student layer"):
        method([], [(6, 4)])
    with pytest.raises(InputError, match="no teacher layer"):
        method([(6, 4)], [])


def fitnet_oracle(loss, scenario, student, teacher):
    students, teachers = SCENARIOS[scenario][:2]
    s, t = len(students) // 2, len(teachers) // 2
    return regression_errors(loss, scenario, student, teacher, s, t)


def regression_errors(loss, scenario, student, teacher, s, t):
    weight, bias = loss.regressor.weight.detach().numpy(), loss.regressor.bias.detach().numpy()
    out = []
    for i in range(B):
        squares = []
        for vector, target in met(scenario, i, s, t, student, teacher):
            for c in range(len(target)):
                hit = bias[c] + sum(weight[c, k] * vector[k] for k in range(len(vector)))
                squares.append((hit - target[c]) ** 2)
        out.append(sum(squares) / len(squares))
    return np.array(out)


def test_the_hint_is_the_middle_of_both_models():
    cases = {(1, 1): (0, 0), (2, 3): (1, 1), (3, 4): (1, 2), (4, 12): (2, 6), (5, 1): (2, 0)}
    for (students, teachers), expected in cases.items():
        loss = FitNetLoss([(6, 2 + s) for s in range(students)], [(6, 20 + t) for t in range(teachers)])
        assert loss.hint_layer == expected and loss.used_teacher_layers == [expected[1]]
        assert (loss.regressor.in_features, loss.regressor.out_features) == (2 + expected[0], 20 + expected[1])


@pytest.mark.parametrize(("hint", "s", "t"), [((0, 2), 0, 2), ((-1, -3), 1, 0), ((-2, 1), 0, 1)])
def test_other_layers_can_be_named_from_the_front_or_from_the_end(hint, s, t):
    loss, student, teacher, own, theirs = problem(FitNetLoss, "text", hint_layer=hint)
    expected = regression_errors(loss, "text", student, teacher, s, t)
    assert loss.hint_layer == (s, t) and loss.used_teacher_layers == [t]
    np.testing.assert_allclose(loss(student, teacher, own, theirs).per_sample.detach(), expected, rtol=1e-9)


@pytest.mark.parametrize("hint", [(2, 0), (0, 3), (-3, 0), (0, -4), (1,)])
def test_a_hint_layer_that_does_not_exist_is_refused(hint):
    with pytest.raises(ConfigurationError, match=r"(?s)received: hint_layer=.*0 to 1.*0 to 2.*what to do"):
        problem(FitNetLoss, "text", hint_layer=hint)


def test_on_maps_the_regressor_is_a_convolution_of_size_one():
    loss = FitNetLoss([(4, 3, 5)], [(6, 3, 5)]).double()
    student, teacher = normal(B, 4, 3, 5), normal(B, 6, 3, 5, seed=1)
    maps = torch.nn.functional.conv2d(student, loss.regressor.weight[:, :, None, None], loss.regressor.bias)
    torch.testing.assert_close(loss([student], [teacher]).per_sample, (maps - teacher).square().mean((1, 2, 3)))


class TestFitNet(RegressionCases):
    problem = staticmethod(partial(problem, FitNetLoss))
    oracle = staticmethod(fitnet_oracle)
    scenarios = SCENARIOS


def layer_map_oracle(loss, scenario, student, teacher):
    out = np.zeros(B)
    pairing = PAIRED[len(student), len(teacher)]
    for s, t in enumerate(pairing):
        weight, bias = loss.projection[s].weight.detach().numpy(), loss.projection[s].bias.detach().numpy()
        for i in range(B):
            squares = []
            for vector, target in met(scenario, i, s, t, student, teacher):
                for c in range(len(target)):
                    hit = bias[c] + sum(weight[c, k] * vector[k] for k in range(len(vector)))
                    squares.append((hit - target[c]) ** 2)
            out[i] += sum(squares) / len(squares) / len(pairing)
    return out


@pytest.mark.parametrize(
    ("students", "teachers", "expected"),
    [(4, 12, [2, 5, 8, 11]), (6, 12, [1, 3, 5, 7, 9, 11]), (3, 3, [0, 1, 2]), (1, 5, [4]), (4, 2, [0, 0, 1, 1])],
)
def test_the_map_is_uniform_and_each_layer_has_its_own_projection(students, teachers, expected):
    loss = LayerMapLoss([(6, 2 + s) for s in range(students)], [(6, 20 + t) for t in range(teachers)])
    assert loss.pairs == list(enumerate(expected)) and loss.used_teacher_layers == sorted(set(expected))
    sizes = [(entry.in_features, entry.out_features) for entry in loss.projection]
    assert sizes == [(2 + s, 20 + t) for s, t in enumerate(expected)]


def test_equal_layers_under_the_identity_have_no_loss():
    loss = LayerMapLoss([(6, 4)] * 2, [(6, 4)] * 4).double()
    for entry in loss.projection:
        torch.nn.init.eye_(entry.weight), torch.nn.init.zeros_(entry.bias)
    teacher = [normal(B, 6, 4, seed=t) for t in range(4)]
    assert float(loss([teacher[1], teacher[3]], teacher, MASK, MASK).total.detach()) == 0
    assert float(loss([teacher[0], teacher[3]], teacher, MASK, MASK).total.detach()) > 0.1


class TestLayerMap(RegressionCases):
    problem = staticmethod(partial(problem, LayerMapLoss))
    oracle = staticmethod(layer_map_oracle)
    scenarios = SCENARIOS


def vid_oracle(loss, scenario, student, teacher):
    out = np.zeros(B)
    for s, t in enumerate(PAIRED[len(student), len(teacher)]):
        first, second, third = (loss.gaussian[s].mean[n].weight.detach().numpy() for n in (0, 2, 4))
        raw = loss.gaussian[s].raw_variance.detach().numpy()
        for i in range(B):
            terms = []
            for vector, target in met(scenario, i, s, t, student, teacher):
                hidden = [max(sum(row * vector), 0.0) for row in first]
                hidden = [max(sum(row * hidden), 0.0) for row in second]
                for c in range(len(target)):
                    mean, variance = sum(third[c] * hidden), math.log(1 + math.exp(raw[c])) + 1e-5
                    terms.append(((mean - target[c]) ** 2 / variance + math.log(variance)) / 2)
            out[i] += sum(terms) / len(terms)
    return out


def test_the_networks_and_variances_start_as_published():
    loss = VIDLoss([(4, 3, 3), (7, 2, 2)], [(6, 3, 3), (5, 2, 2)])
    shapes = [[tuple(entry.shape) for entry in gaussian.mean.parameters()] for gaussian in loss.gaussian]
    assert shapes == [[(6, 4), (6, 6), (6, 6)], [(5, 7), (5, 5), (5, 5)]]
    for gaussian, channels in zip(loss.gaussian, (6, 5), strict=True):
        torch.testing.assert_close(gaussian.variance(), torch.full((channels,), 5.0))


def test_the_variance_that_minimizes_the_loss_is_the_mean_squared_error():
    loss = VIDLoss([(6, 4)], [(6, 3)]).double()
    student, teacher = normal(B, 6, 4), normal(B, 6, 3, seed=1) * torch.tensor([0.5, 1.0, 3.0]) + 1
    optimizer = torch.optim.Adam([loss.gaussian[0].raw_variance], lr=0.1)
    for _ in range(800):
        optimizer.zero_grad()
        loss([student], [teacher], MASK, MASK).total.backward()
        optimizer.step()
    errors = (loss.gaussian[0].mean(student) - teacher).square()
    # Each sample counts the same, however many tokens it has.
    expected = torch.stack([errors[i, : int(MASK[i].sum())].mean(0) for i in range(B)]).mean(0)
    torch.testing.assert_close(loss.gaussian[0].variance(), expected, rtol=1e-3, atol=0)


def test_the_variance_neither_vanishes_nor_overflows():
    loss = VIDLoss([(6, 4)], [(6, 2)])
    loss.gaussian[0].raw_variance.data = torch.tensor([-1e4, 1e4])
    assert loss.gaussian[0].variance().tolist() == pytest.approx([1e-5, 1e4])


class TestVariationalInformation(RegressionCases):
    problem = staticmethod(partial(problem, VIDLoss))
    oracle = staticmethod(vid_oracle)
    scenarios = SCENARIOS


def image_tokens(channels, side, prefix=1):
    return FeatureSpec("image tokens", "tokens", channels, prefix + side * side, (side, side), prefix)


# Student layers, teacher layers, and the teacher layer of each student layer but the last.
PKD_SCENARIOS = {
    "text": ([(6, 4), (6, 5), (6, 4)], [(6, width) for width in (7, 5, 7, 5, 5, 7)], [1, 3]),
    "text, fewer teacher layers": ([(6, 4)] * 4, [(6, 7)] * 3, [0, 1, 2]),
    "other tokenization": ([(6, 4)] * 2, [(9, 4)] * 4, [1]),
    "image tokens": ([image_tokens(4, 2)] * 3, [image_tokens(7, 3)] * 3, [0, 1]),
}


def pkd_problem(scenario, batch=8):
    """Return a loss, features of both models, and the masks of both (text of one tokenization only)."""
    torch.manual_seed(0)
    students, teachers, _ = PKD_SCENARIOS[scenario]
    loss = PKDLoss(students, teachers, tokens_aligned=scenario != "other tokenization").double()
    student = [normal(batch, *shape_of(spec), seed=s) for s, spec in enumerate(students)]
    teacher = [normal(batch, *shape_of(spec), seed=50 + t) for t, spec in enumerate(teachers)]
    masks = (PKD_MASK[:batch], PKD_MASK[:batch]) if scenario.startswith("text") else (None, None)
    return loss, student, teacher, masks


def gradients(loss, student, teacher, masks):
    student = [feature.clone().requires_grad_() for feature in student]
    out = loss(student, teacher, *masks)
    out.total.backward()
    return out, [feature.grad for feature in student], [parameter.grad for parameter in loss.parameters()]


def unit(values):
    return values / math.sqrt(sum(value * value for value in values))


def errors(loss, scenario, student, teacher, first=0):
    """Return the error of each sample, one pair of layers at a time."""
    pairs = PKD_SCENARIOS[scenario][2]
    found = []
    for i in range(len(student[0])):
        parts = []
        for s, t in enumerate(pairs):
            token, target = student[s][i, first].numpy(), teacher[t][i, first].numpy()
            if len(token) != len(target):
                layer = loss.projection[s]
                token = layer.weight.detach().numpy() @ token + layer.bias.detach().numpy()
            parts.append(np.mean([(a - b) ** 2 for a, b in zip(unit(token), unit(target), strict=True)]))
        found.append(sum(parts) / len(pairs))
    return found


@pytest.mark.parametrize("scenario", PKD_SCENARIOS)
def test_pkd_the_loss_is_that_of_the_published_code(scenario):
    loss, student, teacher, masks = pkd_problem(scenario)
    out, expected = loss(student, teacher, *masks), errors(loss, scenario, student, teacher)
    np.testing.assert_allclose(out.per_sample.detach(), expected, rtol=1e-10)
    assert float(out.total.detach()) == pytest.approx(sum(expected) / 8, rel=1e-10)
    assert loss.pairs == list(enumerate(PKD_SCENARIOS[scenario][2]))


def test_pkd_twelve_layers_teach_six_as_in_the_paper():
    loss = PKDLoss([(6, 4)] * 6, [(6, 4)] * 12)
    # Counted from one, the layers 2, 4, 6, 8 and 10.
    assert [t + 1 for _, t in loss.pairs] == [2, 4, 6, 8, 10]
    assert set(named(loss.select([normal(2, 6, 4)] * 12))) == {f"whole.{t}" for t in (1, 3, 5, 7, 9)}


def test_pkd_layers_of_equal_widths_are_not_projected():
    loss, _, _, _ = pkd_problem("text")
    assert isinstance(loss.projection[0], nn.Linear) and loss.projection[0].weight.shape == (5, 4)
    assert isinstance(loss.projection[1], nn.Identity)
    assert not list(PKDLoss([(6, 4)] * 3, [(6, 4)] * 3).parameters())


def test_pkd_lengths_of_tokens_make_no_difference():
    loss, student, teacher, masks = pkd_problem("other tokenization")
    longer = [3 * feature for feature in student], [5 * feature for feature in teacher]
    torch.testing.assert_close(loss(*longer, *masks).total, loss(student, teacher, *masks).total)


@pytest.mark.parametrize("scenario", PKD_SCENARIOS)
def test_pkd_gradients_reach_first_tokens_below_the_last_layer_and_parameters_but_not_the_teacher(scenario):
    loss, student, teacher, masks = pkd_problem(scenario)
    teacher = [feature.requires_grad_() for feature in teacher]
    _, features, parameters = gradients(loss, student, teacher, masks)
    for feature in features[:-1]:
        assert feature[:, 0].abs().max() > 0 and feature[:, 1:].abs().max() == 0
    assert features[-1] is None and all(entry.abs().max() > 0 for entry in parameters)
    assert all(feature.grad is None for feature in teacher)


@pytest.mark.parametrize("filling", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pkd_padding_never_enters(side, filling):
    loss, student, teacher, _ = pkd_problem("text")
    mask = PKD_MASK if side == "right" else PKD_MASK.flip(1)
    expected = [
        errors(loss, "text", [f[i : i + 1] for f in student], [f[i : i + 1] for f in teacher], first)[0]
        for i, first in enumerate(mask.argmax(1).tolist())
    ]
    for feature in (*student, *teacher):
        feature[mask == 0] = filling
    out, features, parameters = gradients(loss, student, teacher, (mask, mask))
    np.testing.assert_allclose(out.per_sample.detach(), expected, rtol=1e-10)
    assert all(feature[mask == 0].abs().max() == 0 and feature.isfinite().all() for feature in features[:-1])
    assert all(entry.isfinite().all() for entry in parameters)


def test_pkd_a_sample_without_any_token_has_no_loss_and_disturbs_nobody():
    loss, student, teacher, masks = pkd_problem("text")
    whole = loss(student, teacher, *masks).per_sample
    mask = PKD_MASK.clone()
    mask[4] = 0
    for feature in (*student, *teacher):
        feature[4] = float("nan")
    out, features, parameters = gradients(loss, student, teacher, (mask, mask))
    others = [i for i in range(8) if i != 4]
    assert out.per_sample[4] == 0 and torch.equal(out.per_sample[others], whole[others])
    assert all(entry.isfinite().all() for entry in (*features[:-1], *parameters))


@pytest.mark.parametrize("scenario", PKD_SCENARIOS)
def test_pkd_a_permutation_of_the_batch_permutes_the_losses(scenario):
    loss, student, teacher, masks = pkd_problem(scenario)
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    parts = [feature[order] for feature in student], [feature[order] for feature in teacher]
    moved = loss(*parts, *[mask if mask is None else mask[order] for mask in masks])
    out = loss(student, teacher, *masks)
    assert out.per_sample.std() > 0
    torch.testing.assert_close(moved.per_sample, out.per_sample[order], rtol=1e-12, atol=0)


@pytest.mark.parametrize("scenario", PKD_SCENARIOS)
def test_pkd_a_batch_of_one_has_the_loss_that_it_has_among_others(scenario):
    loss, student, teacher, masks = pkd_problem(scenario)
    one, one_student, one_teacher, one_masks = pkd_problem(scenario, batch=1)
    one_student, one_teacher = [f[:1] for f in student], [f[:1] for f in teacher]
    out, features, _ = gradients(one, one_student, one_teacher, one_masks)
    torch.testing.assert_close(out.per_sample, loss(student, teacher, *masks).per_sample[:1])
    assert all(feature.isfinite().all() for feature in features[:-1])


def test_pkd_zero_tokens_have_finite_gradients():
    loss, student, teacher, masks = pkd_problem("other tokenization")
    zeros = [torch.zeros_like(feature) for feature in student]
    out, features, _ = gradients(loss, zeros, teacher, masks)
    assert out.total.isfinite() and features[0].isfinite().all()


def test_pkd_half_precision_features_are_compared_in_float32():
    loss, student, teacher, masks = pkd_problem("text")
    loss, small = loss.float(), [[feature.bfloat16() for feature in features] for features in (student, teacher)]
    wide = [[feature.float() for feature in features] for features in small]
    out = copy.deepcopy(loss)(*small, *masks)
    assert out.per_sample.dtype == torch.float32
    torch.testing.assert_close(out.per_sample, loss(*wide, *masks).per_sample, rtol=1e-5, atol=1e-7)


def test_pkd_selected_features_give_what_the_features_give():
    loss, student, teacher, masks = pkd_problem("text")
    kept = loss.select(teacher, masks[1])
    assert torch.equal(loss(student, kept, masks[0]).per_sample, loss(student, teacher, *masks).per_sample)


@pytest.mark.parametrize(
    ("students", "teachers", "text"),
    [
        ([(4, 6, 6), (6, 4)], [(6, 4)] * 2, "a map at student layer `student 0`.*student_layers"),
        ([(6, 4)] * 2, [(4, 6, 6), (6, 4)], "a map at teacher layer `teacher 0`.*teacher_layers"),
        ([image_tokens(4, 2, 0)] * 2, [(6, 4)] * 2, "image patches without a token in front"),
        ([(6, 4)], [(6, 4)] * 2, "one student layer.*at least two"),
    ],
)
def test_pkd_layers_without_a_first_token_and_single_layers_are_refused(students, teachers, text):
    with pytest.raises(ConfigurationError, match=f"(?s){text}"):
        PKDLoss(students, teachers)


@pytest.mark.parametrize(("students", "teachers"), [([], [(6, 4)]), ([(6, 4)] * 2, [])])
def test_pkd_no_layer_at_all_is_refused(students, teachers):
    with pytest.raises(InputError, match="There is no (student|teacher) layer"):
        PKDLoss(students, teachers)


def test_pkd_another_number_of_features_is_refused():
    loss, student, teacher, masks = pkd_problem("text")
    with pytest.raises(InputError, match="2 student and 6 teacher features"):
        loss(student[:2], teacher, *masks)
    with pytest.raises(InputError, match="3 student and 5 teacher features"):
        loss(student, teacher[:5], *masks)


def test_pkd_the_weight_is_the_published_one():
    assert PKDLoss.default_weight == 100.0
