"""Variational information distillation against loops over layers, samples, positions and channels."""

import math

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
from hf_semckd.losses.vid import VIDLoss

# Student layers, teacher layers, masks of both, one tokenization.


def problem(scenario):
    students, teachers, own, theirs, aligned = SCENARIOS[scenario]
    torch.manual_seed(0)
    loss = VIDLoss(students, teachers, tokens_aligned=aligned).double()
    for s, gaussian in enumerate(loss.gaussian):
        # Equal variances would not tell channels apart.
        gaussian.raw_variance.data += normal(len(gaussian.raw_variance), seed=70 + s)
    return loss, features_of(students, 0), features_of(teachers, 50), own, theirs


# Which teacher layer each student layer is paired with, by hand.


def oracle(loss, scenario, student, teacher):
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


def test_the_published_weight_is_the_default():
    assert VIDLoss.default_weight == 1.0


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
    assert len(list(loss.parameters())) == 4 * len(student)
    assert all(feature.grad is None for feature in teacher)


def test_of_the_teacher_only_the_used_layers_are_kept():
    loss, student, teacher, own, theirs = problem("text")
    kept = loss.select(teacher, theirs)
    assert set(named(kept)) == {*(f"whole.{t}" for t in [1, 2]), "mask"}
    assert torch.equal(loss(student, kept, own).per_sample, loss(student, teacher, own, theirs).per_sample)


def test_no_layer_is_refused():
    with pytest.raises(InputError, match="no student layer"):
        VIDLoss([], [(6, 4)])
    with pytest.raises(InputError, match="no teacher layer"):
        VIDLoss([(6, 4)], [])


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
    problem = staticmethod(problem)
    oracle = staticmethod(oracle)
    scenarios = SCENARIOS
