"""Attention transfer against loops over layers, samples, positions and channels."""

import math

import layer_cases
import numpy as np
import pytest
import torch
from kept import named
from layer_cases import (
    PAIRED,
    AloneCases,
    B,
    features_of,
    met,
    normal,
)

from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.losses.at import ATLoss

# Student layers, teacher layers, masks of both, one tokenization.
# With another tokenization every pair meets at one position: it is refused.
SCENARIOS = {name: entry for name, entry in layer_cases.SCENARIOS.items() if name != "other tokenization"}


def problem(scenario):
    students, teachers, own, theirs, aligned = SCENARIOS[scenario]
    torch.manual_seed(0)
    loss = ATLoss(students, teachers, tokens_aligned=aligned).double()
    return loss, features_of(students, 0), features_of(teachers, 50), own, theirs


# Which teacher layer each student layer is paired with, by hand.


def unit(vectors):
    energies = [sum(value**2 for value in vector) / len(vector) for vector in vectors]
    length = math.sqrt(sum(energy**2 for energy in energies))
    return [energy / length for energy in energies]


def oracle(loss, scenario, student, teacher):
    out = np.zeros(B)
    for s, t in enumerate(PAIRED[len(student), len(teacher)]):
        for i in range(B):
            left, right = (unit(vectors) for vectors in zip(*met(scenario, i, s, t, student, teacher), strict=True))
            out[i] += sum((a - b) ** 2 for a, b in zip(left, right, strict=True)) / len(left)
    return out


def test_the_published_weight_is_the_default():
    assert ATLoss.default_weight == 1000.0


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
    assert len(list(loss.parameters())) == 0
    assert all(feature.grad is None for feature in teacher)


def test_of_the_teacher_only_the_used_layers_are_kept():
    loss, student, teacher, own, theirs = problem("text")
    kept = loss.select(teacher, theirs)
    assert set(named(kept)) == {*(f"whole.{t}" for t in [1, 2]), "mask"}
    assert torch.equal(loss(student, kept, own).per_sample, loss(student, teacher, own, theirs).per_sample)


def test_no_layer_is_refused():
    with pytest.raises(InputError, match="no student layer"):
        ATLoss([], [(6, 4)])
    with pytest.raises(InputError, match="no teacher layer"):
        ATLoss([(6, 4)], [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_compared_in_float32(dtype):
    loss, student, teacher, own, theirs = problem("text")
    # Squares of these are beyond float16.
    student, teacher = [(500 * entry).to(dtype) for entry in student], [(500 * entry).to(dtype) for entry in teacher]
    out = loss.float()([entry.requires_grad_() for entry in student], teacher, own, theirs)
    wide = [entry.detach().double() for entry in student], [entry.double() for entry in teacher]
    expected = loss.double()(*wide, own, theirs).per_sample.detach()
    assert out.per_sample.dtype is torch.float32
    torch.testing.assert_close(out.per_sample.detach().double(), expected, rtol=2e-4, atol=1e-6)


def test_maps_of_the_same_shape_up_to_scale_and_width_have_no_loss():
    loss = ATLoss([(4, 3, 5)], [(8, 3, 5)]).double()
    student = normal(B, 4, 3, 5)
    assert float(loss([student], [-7 * torch.cat([student, student], 1)]).total) < 1e-25
    assert float(loss([student], [torch.cat([student, student.flip(2)], 1)]).total) > 1e-3


def test_one_active_position_each_is_worked_out_by_hand():
    loss = ATLoss([(4, 3)], [(4, 2)]).double()
    student, teacher = torch.zeros(1, 4, 3).double(), torch.zeros(1, 4, 2).double()
    student[0, 0], teacher[0, 2] = 5.0, -0.1
    assert float(loss([student], [teacher]).total) == pytest.approx(2 / 4)
    mask = torch.tensor([[1, 1, 1, 0]])
    assert float(loss([student], [teacher], mask, mask).total) == pytest.approx(2 / 3)
    teacher[0, 0] = 0.1
    expected = ((1 - math.sqrt(0.5)) ** 2 + 0.5) / 4
    assert float(loss([student], [teacher]).total) == pytest.approx(expected)


def test_a_dead_layer_has_a_finite_gradient():
    loss = ATLoss([(6, 4)], [(6, 3)])
    student = torch.zeros(B, 6, 4, requires_grad=True)
    out = loss([student], [normal(B, 6, 3).float()])
    out.total.backward()
    torch.testing.assert_close(out.per_sample.detach(), torch.full((B,), 1 / 6))
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("students", "teachers", "aligned"),
    [
        ([(6, 4), (6, 5)], [(9, 6), (9, 3)], True),
        ([(6, 4), (6, 5)], [(6, 6), (6, 3)], False),
        ([(4, 5, 5)], [(6, 3)], True),
        ([(4, 5, 5), (4, 1, 1)], [(6, 1, 1), (6, 7, 7)], True),
        ([(4, 5, 1)], [(6, 1, 5)], True),
        ([(1, 4)], [(1, 6)], True),
    ],
)
def test_pairs_that_all_meet_at_one_position_are_refused(students, teachers, aligned):
    with pytest.raises(
        ConfigurationError, match=r"(?s)received: pairs that share one position.*expected: .*what to do: "
    ):
        ATLoss(students, teachers, tokens_aligned=aligned)


def test_a_pair_that_meets_at_one_position_is_left_out():
    students, teachers = [(4, 6, 6), (5, 3)], [(6, 3, 3), (7, 4, 4)]
    loss, first = ATLoss(students, teachers), ATLoss(students[:1], teachers[:1])
    student, teacher = features_of(students, 0), features_of(teachers, 50)
    assert loss.pairs == [(0, 0)] and set(named(loss.select(teacher))) == {"whole.0"}
    assert torch.equal(loss(student, teacher).per_sample, first(student[:1], teacher[:1]).per_sample)


class TestAttentionTransfer(AloneCases):
    problem = staticmethod(problem)
    oracle = staticmethod(oracle)
    scenarios = SCENARIOS

    def test_it_is_what_loops_over_samples_positions_and_channels_give(self, scenario):
        loss, student, teacher, own, theirs = problem(scenario)
        out = loss(student, teacher, own, theirs)
        expected = oracle(loss, scenario, student, teacher)
        assert np.std(expected) > 1e-4, "equal losses would not tell the samples apart"
        np.testing.assert_allclose(out.per_sample.detach(), expected, rtol=1e-9)
        assert float(out.total.detach()) == pytest.approx(np.mean(expected), rel=1e-9)
        assert out.association is None and out.errors is None
