"""Correlation congruence against loops over its equation."""

import math

import numpy as np
import pytest
import torch
from embedding_cases import MASK, SCENARIOS, HeadCases, normal, shape_of, vectors

from hf_semckd.losses.cc import CCLoss, gaussian_correlations


def problem(scenario, batch=8, **options):
    """Return a loss, features of both models, and the masks of both (text only)."""
    torch.manual_seed(0)
    students, teachers = SCENARIOS[scenario]
    loss = CCLoss(students, teachers, **options).double()
    student = [normal(batch, *shape_of(spec), seed=s) for s, spec in enumerate(students)]
    teacher = [normal(batch, *shape_of(spec), seed=50 + t) for t, spec in enumerate(teachers)]
    masks = (MASK[:batch], MASK[:batch]) if scenario == "text" else (None, None)
    return loss, student, teacher, masks


def correlations(rows, head):
    """Return the Taylor series of the Gaussian kernel of every two embeddings of unit length."""
    embedded = [head.weight.detach().numpy() @ row + head.bias.detach().numpy() for row in rows]
    units = [row / math.sqrt(row @ row) for row in embedded]

    def kernel(x, y):
        return math.exp(-0.8) * (1 + 0.8 * (x @ y) + (0.8 * (x @ y)) ** 2 / 2)

    return [[kernel(x, y) for y in units] for x in units]


@pytest.mark.parametrize("size", [256, 3])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_loss_is_that_of_the_equation(scenario, size):
    loss, student, teacher, masks = problem(scenario, **({"embedding_size": size} if size != 256 else {}))
    own = correlations(vectors(student, scenario), loss.student_head)
    theirs = correlations(vectors(teacher, scenario), loss.teacher_head)
    expected = [sum((s - t) ** 2 for s, t in zip(own[i], theirs[i], strict=True)) / 8 for i in range(8)]
    out = loss(student, teacher, *masks)
    np.testing.assert_allclose(out.per_sample.detach(), expected, rtol=1e-9)
    assert float(out.total.detach()) == pytest.approx(sum(expected) / 8, rel=1e-10)
    assert loss.student_head.weight.shape == (size, 5) and loss.teacher_head.weight.shape == (size, 7)


def test_the_series_is_close_to_the_gaussian_kernel_of_near_samples():
    rows = normal(6, 4)
    rows = rows / rows.norm(dim=1, keepdim=True)
    squares = (rows[:, None] - rows[None]).square().sum(-1)
    series = gaussian_correlations(5 * rows)
    torch.testing.assert_close(series, torch.exp(-0.4 * squares), rtol=0, atol=0.08)
    assert torch.allclose(series.diagonal(), torch.tensor(math.exp(-0.8) * 2.12, dtype=torch.float64))


def test_the_weight_is_the_published_one():
    assert CCLoss.default_weight == 0.02


class TestCorrelationCongruence(HeadCases):
    problem = staticmethod(problem)
