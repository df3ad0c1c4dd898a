"""The uniform layer map against loops over layers, samples, positions and channels."""

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

from hf_semckd.errors import InputError
from hf_semckd.losses.layer_map import LayerMapLoss

# Student layers, teacher layers, masks of both, one tokenization.


def problem(scenario):
    students, teachers, own, theirs, aligned = SCENARIOS[scenario]
    torch.manual_seed(0)
    loss = LayerMapLoss(students, teachers, tokens_aligned=aligned).double()
    return loss, features_of(students, 0), features_of(teachers, 50), own, theirs


# Which teacher layer each student layer is paired with, by hand.


def oracle(loss, scenario, student, teacher):
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


def test_the_published_weight_is_the_default():
    assert LayerMapLoss.default_weight == 1.0


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_gradients_reach_the_student_and_the_parameters_and_not_the_teacher(scenario):
    loss, student, teacher, own, theirs = problem(scenario)
    for feature in [*student, *teacher]:
        feature.requires_grad_()
    loss(student, teacher, own, theirs).total.backward()
    compared = range(len(student))
    assert all((feature.grad is not None) == (s in compared) for s, feature in enumerate(student))
    assert all(student[s].grad.abs().sum() > 0 for s in compared)
    assert all(entry.grad is not None and entry.grad.abs().sum() > 0 for entry in loss.parameters())
    assert len(list(loss.parameters())) == 2 * len(student)
    assert all(feature.grad is None for feature in teacher)


def test_of_the_teacher_only_the_used_layers_are_kept():
    loss, student, teacher, own, theirs = problem("text")
    kept = loss.select(teacher, theirs)
    assert set(named(kept)) == {*(f"whole.{t}" for t in [1, 2]), "mask"}
    assert torch.equal(loss(student, kept, own).per_sample, loss(student, teacher, own, theirs).per_sample)


def test_no_layer_is_refused():
    with pytest.raises(InputError, match="no student layer"):
        LayerMapLoss([], [(6, 4)])
    with pytest.raises(InputError, match="no teacher layer"):
        LayerMapLoss([(6, 4)], [])


@pytest.mark.parametrize(
    ("students", "teachers", "expected"),
    [(4, 12, [2, 5, 8, 11]), (6, 12, [1, 3, 5, 7, 9, 11]), (3, 3, [0, 1, 2]), (1, 5, [4]), (4, 2, [0, 0, 1, 1])],
)
def test_the_map_is_uniform_and_each_layer_has_its_own_projection(students, teachers, expected):
    loss = LayerMapLoss([(6, 2 + s) for s in range(students)], [(6, 20 + t) for t in range(teachers)])
    assert loss.teacher_of == expected and loss.used_teacher_layers == sorted(set(expected))
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
    problem = staticmethod(problem)
    oracle = staticmethod(oracle)
    scenarios = SCENARIOS
