"""Similarity-preserving distillation against loops over pairs of samples."""

import math

import numpy as np
import pytest
import torch
from kept import named
from layer_cases import (
    SCENARIOS,
    B,
    LayerCases,
    features_of,
    normal,
)

from hf_semckd.errors import InputError
from hf_semckd.losses.sp import SPLoss

# Student layers, teacher layers, masks of both, one tokenization.


def problem(scenario):
    students, teachers, own, theirs, aligned = SCENARIOS[scenario]
    torch.manual_seed(0)
    loss = SPLoss(students, teachers, tokens_aligned=aligned).double()
    return loss, features_of(students, 0), features_of(teachers, 50), own, theirs


def rows_of(feature, mask):
    """Return the similarities of every two samples, a sample at a time, each row of unit length."""
    feature = feature.detach().numpy()
    table = []
    for i in range(len(feature)):
        row = []
        for k in range(len(feature)):
            product = 0.0
            for place in np.ndindex(*feature.shape[1:]):
                if mask is None or (mask[i, place[0]] and mask[k, place[0]]):
                    product += feature[(i, *place)] * feature[(k, *place)]
            row.append(product)
        length = math.sqrt(sum(value**2 for value in row))
        table.append([value / length for value in row])
    return table


def oracle(loss, scenario, student, teacher):
    own, theirs = SCENARIOS[scenario][2:4]
    left, right = rows_of(student[-1], own), rows_of(teacher[-1], theirs)
    return np.array([sum((right[i][k] - left[i][k]) ** 2 for k in range(B)) / B for i in range(B)])


def test_the_published_weight_is_the_default():
    assert SPLoss.default_weight == 3000.0


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_gradients_reach_the_student_and_the_parameters_and_not_the_teacher(scenario):
    loss, student, teacher, own, theirs = problem(scenario)
    for feature in [*student, *teacher]:
        feature.requires_grad_()
    loss(student, teacher, own, theirs).total.backward()
    compared = [len(student) - 1]
    assert all((feature.grad is not None) == (s in compared) for s, feature in enumerate(student))
    assert all(student[s].grad.abs().sum() > 0 for s in compared)
    assert all(entry.grad is not None and entry.grad.abs().sum() > 0 for entry in loss.parameters())
    assert len(list(loss.parameters())) == 0
    assert all(feature.grad is None for feature in teacher)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_batch_of_one_has_nothing_to_compare(scenario):
    loss, student, teacher, own, theirs = problem(scenario)
    masks = [None if mask is None else mask[:1] for mask in (own, theirs)]
    student = [feature[:1].clone().requires_grad_() for feature in student]
    out = loss(student, [feature[:1] for feature in teacher], *masks)
    out.total.backward()
    assert out.per_sample.shape == (1,) and float(out.total.detach()) < 1e-25
    assert student[-1].grad.abs().max() < 1e-12


def test_of_the_teacher_only_the_used_layers_are_kept():
    loss, student, teacher, own, theirs = problem("text")
    kept = loss.select(teacher, theirs)
    assert set(named(kept)) == {*(f"whole.{t}" for t in [2]), "mask"}
    assert torch.equal(loss(student, kept, own).per_sample, loss(student, teacher, own, theirs).per_sample)


def test_no_layer_is_refused():
    with pytest.raises(InputError, match="no student layer"):
        SPLoss([], [(6, 4)])
    with pytest.raises(InputError, match="no teacher layer"):
        SPLoss([(6, 4)], [])


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


def test_the_total_is_the_squared_frobenius_norm_over_the_squared_batch_size():
    loss, student, teacher, own, theirs = problem("text")
    left, right = np.array(rows_of(student[-1], own)), np.array(rows_of(teacher[-1], theirs))
    expected = np.linalg.norm(right - left, "fro") ** 2 / B**2
    assert float(loss(student, teacher, own, theirs).total) == pytest.approx(expected, rel=1e-9)


def test_three_samples_are_worked_out_by_hand():
    loss = SPLoss([(1, 2)], [(1, 2)]).double()
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]], dtype=torch.float64).unsqueeze(1)
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 3.0]], dtype=torch.float64).unsqueeze(1)
    half, fifth = math.sqrt(1 / 2), math.sqrt(1 / 5)
    # Student rows: (1, 0, 0), (0, 1, 2) / sqrt 5 twice. Teacher rows: (1, 1, 0) / sqrt 2 twice, (0, 0, 1).
    expected = [
        (1 - half) ** 2 + half**2,
        half**2 + (half - fifth) ** 2 + (2 * fifth) ** 2,
        fifth**2 + (1 - 2 * fifth) ** 2,
    ]
    np.testing.assert_allclose(loss([student], [teacher]).per_sample, np.array(expected) / 3, rtol=1e-12)


def test_neither_scale_nor_rotation_of_the_features_matters():
    loss = SPLoss([(6, 4)], [(6, 4)]).double()
    student, rotation = normal(B, 6, 4), torch.linalg.qr(normal(4, 4, seed=1))[0]
    assert float(loss([student], [-3 * student @ rotation]).total) < 1e-25
    assert float(loss([student], [student.abs()]).total) > 1e-3


def test_a_sample_without_any_token_gives_no_nan():
    loss, student, teacher, own, _ = problem("text")
    mask = own.clone()
    mask[2] = 0
    student = [feature.requires_grad_() for feature in student]
    out = loss(student, teacher, mask, mask)
    out.total.backward()
    assert float(out.per_sample[2].detach()) == 0 and float(out.total.detach()) > 0
    assert student[-1].grad.isfinite().all() and student[-1].grad[2].abs().max() == 0


class TestSimilarityPreserving(LayerCases):
    problem = staticmethod(problem)
    oracle = staticmethod(oracle)
    scenarios = SCENARIOS
