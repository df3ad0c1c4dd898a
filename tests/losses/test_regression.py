"""Regressions of the teacher's layers against loops over layers, samples, positions and channels."""

import math
from functools import partial

import numpy as np
import pytest
import torch
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

from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.losses.regression import FitNetLoss, LayerMapLoss, VIDLoss

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
