"""Probabilistic knowledge transfer against loops over its equations."""

import math

import numpy as np
import pytest
import torch
from embedding_cases import MASK, SCENARIOS, RelationCases, normal, shape_of, vectors

from hf_semckd.losses.pkt import PKTLoss


def problem(scenario, batch=8, **options):
    """Return a loss, features of both models, and the masks of both (text only)."""
    torch.manual_seed(0)
    students, teachers = SCENARIOS[scenario]
    loss = PKTLoss(students, teachers, **options).double()
    student = [normal(batch, *shape_of(spec), seed=s) for s, spec in enumerate(students)]
    teacher = [normal(batch, *shape_of(spec), seed=50 + t) for t, spec in enumerate(teachers)]
    masks = (MASK[:batch], MASK[:batch]) if scenario == "text" else (None, None)
    return loss, student, teacher, masks


def probabilities(rows):
    """Return p[i][j], the shifted cosine over the sum of its row."""
    table = []
    for x in rows:
        kernel = [(x @ y / math.sqrt((x @ x) * (y @ y)) + 1) / 2 for y in rows]
        table.append([entry / sum(kernel) for entry in kernel])
    return table


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_loss_is_that_of_the_equations(scenario):
    loss, student, teacher, masks = problem(scenario)
    own, theirs = probabilities(vectors(student, scenario)), probabilities(vectors(teacher, scenario))
    expected = [
        sum(t * math.log((t + 1e-7) / (s + 1e-7)) for s, t in zip(own[i], theirs[i], strict=True)) / 8
        for i in range(8)
    ]
    out = loss(student, teacher, *masks)
    np.testing.assert_allclose(out.per_sample, expected, rtol=1e-9)
    assert float(out.total) == pytest.approx(sum(expected) / 8, rel=1e-10) and out.total > 1e-5


def test_a_student_that_differs_by_a_rotation_and_by_lengths_has_no_loss():
    _, _, teacher, masks = problem("text")
    same = PKTLoss([(6, 7)], [(6, 7)])
    rotation = torch.linalg.qr(normal(7, 7))[0]
    assert same([3 * teacher[1] @ rotation], teacher[1:], *masks).total.abs() < 1e-12


def test_the_weight_is_the_published_one():
    assert PKTLoss.default_weight == 30000.0


class TestProbabilisticTransfer(RelationCases):
    problem = staticmethod(problem)
