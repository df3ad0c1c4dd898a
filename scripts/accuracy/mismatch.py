"""The semantic mismatch score: how differently associated layers see the samples of a batch (Wang et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_semckd import DistillationTrainer
from hf_semckd.errors import InputError
from hf_semckd.features.capture import remove_capturing_traces
from hf_semckd.features.geometry import Average
from hf_semckd.losses.similarity import similarity_matrix

from .data import Rows, collate

SAMPLES = 256


def mismatch_score(
    student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], association: np.ndarray
) -> float:
    """Return log of the mean over s of sum_t alpha[s, t] * ||A_s - A_t||, with cosine similarity matrices A.

    Lower is better calibrated; -inf where associated layers see all samples alike.

    Args:
        student_features: S tensors (B, C_s), one vector a sample.
        teacher_features: T tensors (B, C_t) of the same samples.
        association: (S, T) weights alpha, whose rows sum to 1.

    Raises:
        InputError: When the association is of other layers, or the features are of other samples.
    """
    expected = len(student_features), len(teacher_features)
    samples = {len(rows) for rows in (*student_features, *teacher_features)}
    weights = np.asarray(association, dtype=np.float64)
    if weights.shape != expected or len(samples) != 1:
        raise InputError(
            "The association and the features do not belong together",
            received=f"an association {weights.shape}, {expected} layers, batches of {sorted(samples)}",
            expected="a weight for each pair of layers, and the same samples in all of them",
            todo="take all of them from one run",
        )
    own = [similarity_matrix(rows.double(), normalize=True) for rows in student_features]
    theirs = [similarity_matrix(rows.double(), normalize=True) for rows in teacher_features]
    distances = np.array([[float((s - t).norm()) for t in theirs] for s in own])
    mean = float((weights * distances).sum(1).mean())
    return math.log(mean) if mean > 0 else -math.inf


def measured_mismatch(
    trainer: DistillationTrainer, rows: Rows, known: MutableMapping[tuple[str, ...], list[Tensor]]
) -> float | None:
    """Return the score of a trained student, of layers averaged over their positions, or None where there is none.

    Args:
        trainer: After its training.
        rows: Rows that nothing was trained on; the first 256 are taken.
        known: What the teacher's layers gave for these rows, by their names; what is missing is added.
    """
    association = trainer.association()
    if association is None:
        return None
    batch = collate([rows[index] for index in range(min(len(rows), SAMPLES))])
    batch = {name: value.to(trainer.args.device) for name, value in batch.items()}
    teacher = tuple(trainer.teacher_layer_names)
    if teacher not in known:
        known[teacher] = _teacher_features(trainer, batch)
    student = _student_features(trainer, batch)
    if association.shape != (len(student), len(known[teacher])):
        return None
    score = mismatch_score(student, known[teacher], association)
    return score if math.isfinite(score) else None


@torch.no_grad()
def _student_features(trainer: DistillationTrainer, batch: dict[str, Tensor]) -> list[Tensor]:
    student, capture = trainer.student.eval(), trainer.pair.capture
    inputs = trainer.pair.router.student_inputs(batch)
    with capture.recording(student) as recorded:
        found = capture.collect(student(**inputs, **capture.request()), recorded)
    remove_capturing_traces(student)
    return list(map(Average(inputs.get("attention_mask")), found))


@torch.no_grad()
def _teacher_features(trainer: DistillationTrainer, batch: dict[str, Tensor]) -> list[Tensor]:
    cached = trainer.pair.cached_teachers
    teacher: Any = cached[0].load() if cached else trainer.pair.teacher
    inputs = teacher.inputs(batch)
    found = teacher.capture.collect(*teacher.forward(inputs, features=True))
    teacher.remove_traces()
    return list(map(Average(inputs.get("attention_mask")), found))
