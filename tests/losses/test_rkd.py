"""Relational knowledge distillation against loops over its equations."""

import itertools
import math

import numpy as np
import pytest
import torch
from embedding_cases import MASK, SCENARIOS, RelationCases, normal, shape_of, vectors

from hf_semckd.losses.rkd import RKDLoss


def problem(scenario, batch=8, **options):
    """Return a loss, features of both models, and the masks of both (text only)."""
    torch.manual_seed(0)
    students, teachers = SCENARIOS[scenario]
    loss = RKDLoss(students, teachers, **options).double()
    student = [normal(batch, *shape_of(spec), seed=s) for s, spec in enumerate(students)]
    teacher = [normal(batch, *shape_of(spec), seed=50 + t) for t, spec in enumerate(teachers)]
    masks = (MASK[:batch], MASK[:batch]) if scenario == "text" else (None, None)
    return loss, student, teacher, masks


def distances(rows):
    """Return the distances over the mean of those that are not zero."""
    table = np.array([[math.sqrt(sum((x - y) ** 2)) for y in rows] for x in rows])
    return table / np.mean([entry for entry in table.flatten() if entry > 0])


def angle(vertex, j, k):
    """Return the cosine of the angle at `vertex`, zero where a side has no length."""
    sides = math.sqrt(sum((j - vertex) ** 2)), math.sqrt(sum((k - vertex) ** 2))
    return 0.0 if min(sides) == 0 else (j - vertex) @ (k - vertex) / (sides[0] * sides[1])


def huber(difference):
    return difference**2 / 2 if abs(difference) <= 1 else abs(difference) - 0.5


def shares(own, theirs, distance_weight=25, angle_weight=50):
    """Return the loss of each sample."""
    size, near, far = len(own), distances(own), distances(theirs)
    found = []
    for i in range(size):
        lengths = [huber(near[i, j] - far[i, j]) for j in range(size)]
        angles = [
            huber(angle(own[i], own[j], own[k]) - angle(theirs[i], theirs[j], theirs[k]))
            for j, k in itertools.product(range(size), repeat=2)
        ]
        found.append(distance_weight * sum(lengths) / size + angle_weight * sum(angles) / size**2)
    return found


@pytest.mark.parametrize("weights", [(25, 50), (1, 0), (0, 3)])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_loss_is_that_of_the_equations(scenario, weights):
    options = {"distance_weight": weights[0], "angle_weight": weights[1]} if weights != (25, 50) else {}
    loss, student, teacher, masks = problem(scenario, **options)
    expected = shares(vectors(student, scenario), vectors(teacher, scenario), *weights)
    out = loss(student, teacher, *masks)
    np.testing.assert_allclose(out.per_sample, expected, rtol=1e-10)
    assert float(out.total) == pytest.approx(sum(expected) / 8, rel=1e-10)


def test_large_errors_count_linearly():
    loss = RKDLoss([(1, 1)], [(1, 1)], distance_weight=1, angle_weight=0).double()
    student = torch.zeros(8, 1, 1, dtype=torch.float64)
    student[0] = 1.0
    teacher = torch.arange(8.0, dtype=torch.float64).view(8, 1, 1) ** 3
    own, theirs = list(student[:, 0].numpy()), list(teacher[:, 0].numpy())
    assert np.abs(distances(own) - distances(theirs)).max() > 1
    np.testing.assert_allclose(loss([student], [teacher]).per_sample, shares(own, theirs, 1, 0), rtol=1e-10)


def test_identical_samples_have_no_distance_and_no_direction():
    loss, student, teacher, masks = problem("maps")
    student[1][3], teacher[1][5] = student[1][1], teacher[1][2]
    expected = shares(vectors(student, "maps"), vectors(teacher, "maps"))
    np.testing.assert_allclose(loss(student, teacher, *masks).per_sample, expected, rtol=1e-10)


def test_a_student_that_differs_by_a_rotation_a_shift_and_scale_has_no_loss():
    _, _, teacher, masks = problem("text")
    same = RKDLoss([(6, 7)], [(6, 7)])
    rotation = torch.linalg.qr(normal(7, 7))[0]
    assert same([3 * teacher[1] @ rotation + 2], teacher[1:], *masks).total < 1e-12


def test_the_weight_is_the_published_one():
    assert RKDLoss.default_weight == 1.0


class TestRelational(RelationCases):
    problem = staticmethod(problem)
