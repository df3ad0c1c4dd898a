"""FitNets against loops over samples, positions and channels."""

import numpy as np
import pytest
import torch
from kept import named
from layer_cases import (
    SCENARIOS,
    B,
    RegressionCases,
    features_of,
    met,
    normal,
)

from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.losses.fitnet import FitNetLoss

# Student layers, teacher layers, masks of both, one tokenization.


def problem(scenario, **options):
    students, teachers, own, theirs, aligned = SCENARIOS[scenario]
    torch.manual_seed(0)
    loss = FitNetLoss(students, teachers, tokens_aligned=aligned, **options).double()
    return loss, features_of(students, 0), features_of(teachers, 50), own, theirs


def oracle(loss, scenario, student, teacher):
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


def test_the_published_weight_is_the_default():
    assert FitNetLoss.default_weight == 100.0


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_gradients_reach_the_student_and_the_parameters_and_not_the_teacher(scenario):
    loss, student, teacher, own, theirs = problem(scenario)
    for feature in [*student, *teacher]:
        feature.requires_grad_()
    loss(student, teacher, own, theirs).total.backward()
    compared = [len(student) // 2]
    assert all((feature.grad is not None) == (s in compared) for s, feature in enumerate(student))
    assert all(student[s].grad.abs().sum() > 0 for s in compared)
    assert all(entry.grad is not None and entry.grad.abs().sum() > 0 for entry in loss.parameters())
    assert len(list(loss.parameters())) == 2
    assert all(feature.grad is None for feature in teacher)


def test_of_the_teacher_only_the_used_layers_are_kept():
    loss, student, teacher, own, theirs = problem("text")
    kept = loss.select(teacher, theirs)
    assert set(named(kept)) == {*(f"whole.{t}" for t in [1]), "mask"}
    assert torch.equal(loss(student, kept, own).per_sample, loss(student, teacher, own, theirs).per_sample)


def test_no_layer_is_refused():
    with pytest.raises(InputError, match="no student layer"):
        FitNetLoss([], [(6, 4)])
    with pytest.raises(InputError, match="no teacher layer"):
        FitNetLoss([(6, 4)], [])


def test_the_hint_is_the_middle_of_both_models():
    cases = {(1, 1): (0, 0), (2, 3): (1, 1), (3, 4): (1, 2), (4, 12): (2, 6), (5, 1): (2, 0)}
    for (students, teachers), expected in cases.items():
        loss = FitNetLoss([(6, 2 + s) for s in range(students)], [(6, 20 + t) for t in range(teachers)])
        assert loss.hint_layer == expected and loss.used_teacher_layers == [expected[1]]
        assert (loss.regressor.in_features, loss.regressor.out_features) == (2 + expected[0], 20 + expected[1])


@pytest.mark.parametrize(("hint", "s", "t"), [((0, 2), 0, 2), ((-1, -3), 1, 0), ((-2, 1), 0, 1)])
def test_other_layers_can_be_named_from_the_front_or_from_the_end(hint, s, t):
    loss, student, teacher, own, theirs = problem("text", hint_layer=hint)
    expected = regression_errors(loss, "text", student, teacher, s, t)
    assert loss.hint_layer == (s, t) and loss.used_teacher_layers == [t]
    np.testing.assert_allclose(loss(student, teacher, own, theirs).per_sample.detach(), expected, rtol=1e-9)


@pytest.mark.parametrize("hint", [(2, 0), (0, 3), (-3, 0), (0, -4), (1,)])
def test_a_hint_layer_that_does_not_exist_is_refused(hint):
    with pytest.raises(ConfigurationError, match=r"(?s)received: hint_layer=.*0 to 1.*0 to 2.*what to do"):
        problem("text", hint_layer=hint)


def test_on_maps_the_regressor_is_a_convolution_of_size_one():
    loss = FitNetLoss([(4, 3, 5)], [(6, 3, 5)]).double()
    student, teacher = normal(B, 4, 3, 5), normal(B, 6, 3, 5, seed=1)
    maps = torch.nn.functional.conv2d(student, loss.regressor.weight[:, :, None, None], loss.regressor.bias)
    torch.testing.assert_close(loss([student], [teacher]).per_sample, (maps - teacher).square().mean((1, 2, 3)))


class TestFitNet(RegressionCases):
    problem = staticmethod(problem)
    oracle = staticmethod(oracle)
    scenarios = SCENARIOS
