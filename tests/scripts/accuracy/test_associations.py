"""scripts/accuracy/associations.py: weights by numpy and by hand, and trainings that use them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy.associations import (
    STUDIED,
    CenteredKernelAlignment,
    GradientAgreement,
    LookAhead,
    RandomWeights,
    trainer_class,
)
from accuracy.data import collate
from accuracy.models import COMMON, QUIET, make_model
from accuracy.protocol import read_methods
from accuracy_cases import STUDENT, TEACHER

from hf_semckd import SemCKDConfig
from hf_semckd.losses import CombinedLoss, SemCKDLoss


def numpy_cka(first: np.ndarray, second: np.ndarray) -> float:
    """Linear CKA by the norms of cross-covariances, not by centered kernels."""
    first, second = first - first.mean(0), second - second.mean(0)
    cross = np.linalg.norm(first.T @ second) ** 2
    return float(cross / (np.linalg.norm(first.T @ first) * np.linalg.norm(second.T @ second)))


def test_the_cka_weights_by_numpy():
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(9, 5, width, generator=generator) + 2 for width in (6, 4)]
    # One teacher layer that says what the student's first does.
    teacher = [torch.randn(9, 5, 7, generator=generator), student[0] @ torch.randn(6, 7, generator=generator)]
    teacher += [torch.randn(9, 5, 3, generator=generator)]
    association = CenteredKernelAlignment()
    loss = SemCKDLoss([(5, 6), (5, 4)], [(5, 7), (5, 7), (5, 3)], association=association)
    found = loss(student, teacher).association
    means = [[x.mean(1).double().numpy() for x in layers] for layers in (student, teacher)]
    alignment = np.array([[numpy_cka(own, theirs) for theirs in means[1]] for own in means[0]])
    expected = np.exp(alignment / 0.2) / np.exp(alignment / 0.2).sum(1, keepdims=True)
    assert found.shape == (9, 2, 3)
    for sample in found:
        np.testing.assert_allclose(sample.numpy(), expected, atol=1e-5)
    assert found[0, 0].argmax() == 1


def test_random_weights_are_uniform_on_the_simplex():
    loss = SemCKDLoss([(5, 6), (5, 4)], [(5, 7)] * 3, association=RandomWeights())
    student, teacher = [torch.randn(400, 5, 6), torch.randn(400, 5, 4)], [torch.randn(400, 5, 7)] * 3
    torch.manual_seed(0)
    first, second = loss(student, teacher).association, loss(student, teacher).association
    assert first.shape == (400, 2, 3) and first.min() >= 0 and not torch.equal(first, second)
    torch.testing.assert_close(first.sum(-1), torch.ones(400, 2))
    # Of a flat Dirichlet of three: means 1/3, variances 1/18.
    torch.testing.assert_close(first.mean((0, 1)), torch.full((3,), 1 / 3), rtol=0, atol=0.03)
    torch.testing.assert_close(first.var((0, 1)), torch.full((3,), 1 / 18), rtol=0, atol=0.01)


def trained(digits: Any, folder: Path, method: Any, steps: int = 8, **arguments: Any) -> Any:
    rows = digits.pool
    config = SemCKDConfig(
        str(folder), **{**QUIET, **COMMON}, use_cpu=True, max_steps=steps,
        per_device_train_batch_size=16, learning_rate=0.002, logging_steps=1, **arguments,
    )  # fmt: skip
    student, teacher = make_model(STUDENT, rows, 1), make_model(TEACHER, rows, 0)
    trainer = trainer_class(method)(
        student, config, teacher_model=teacher, train_dataset=rows, data_collator=collate,
        feature_loss=method.loss,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["semckd-cka", "semckd-random", "semckd-gradient", "semckd-lookahead"])
def test_studied_associations_train_and_choose(digits, tmp_path, name):
    (method,) = read_methods([name])
    trainer = trained(digits, tmp_path, method)
    trainer_type, _ = STUDIED[method.association]
    assert isinstance(trainer, trainer_type) and trainer.feature_loss.association.name == method.association
    assert trainer.feature_loss.relation_weight == 20.0 and trainer.state.global_step == 8
    losses = [entry["feature_loss"] for entry in trainer.state.log_history if "feature_loss" in entry]
    assert losses and all(math.isfinite(loss) for loss in losses)
    weights = np.asarray(trainer.association())
    assert weights.shape == (2, 3)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-4)
    assert np.abs(weights - 1 / 3).max() > 1e-3 and weights.min() > 0


def test_gradient_agreement_by_hand():
    """Task gradients that are those of one teacher's error give that teacher the most weight."""
    torch.manual_seed(0)
    loss = SemCKDLoss([(5, 6)], [(5, 7)] * 3).train()
    loss.association = GradientAgreement(loss.comparison)
    student, teacher = torch.randn(4, 5, 6, requires_grad=True), [torch.randn(4, 5, 7) for _ in range(3)]
    torch.testing.assert_close(loss([student], teacher).association, torch.full((4, 1, 3), 1 / 3))
    loss.collecting = False
    gradients = []
    for statistics, entry in zip(loss.statistics, teacher, strict=True):
        target = statistics(entry)
        error = (loss.projection[0]["7"](student) - target).square().mean((1, 2)).sum()
        gradients.append(torch.autograd.grad(error, student)[0])
    for task in gradients:
        loss.association.task_gradients = [task]
        cosine = torch.stack([torch.cosine_similarity(g.flatten(1), task.flatten(1)) for g in gradients], 1)
        expected = torch.softmax(cosine / 0.2, -1).unsqueeze(1)
        torch.testing.assert_close(loss([student], teacher).association, expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(loss([student], teacher).association, torch.full((4, 1, 3), 1 / 3))


def test_the_look_ahead_moves_towards_what_agrees():
    association = LookAhead(2, 3)
    for _ in range(10):
        association.look(torch.tensor([[0.3, 0.0, -0.3], [-0.1, 0.0, 0.1]]))
    weights = torch.softmax(association.score, -1)
    assert weights[0].tolist() == sorted(weights[0].tolist(), reverse=True)
    assert weights[1].tolist() == sorted(weights[1].tolist()) and weights[0, 0] > 0.4
    still = LookAhead(1, 3)
    still.look(torch.full((1, 3), 0.5))
    assert torch.equal(still.score, torch.zeros(1, 3))


def test_options_reach_the_last_of_joined_losses(digits, tmp_path):
    (method,) = read_methods(["semckd+crd"])
    loss = trained(digits, tmp_path, method, steps=2).feature_loss
    assert isinstance(loss, CombinedLoss) and isinstance(loss.losses[0], SemCKDLoss)
    assert len(loss.losses[1].student_ring) == method.options["negatives"] == 1000
