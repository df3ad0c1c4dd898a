"""The trainers of a recipe: that of the student, and that of a teacher which is fine-tuned first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..config import SemCKDConfig
from ..training.trainer import DistillationTrainer
from .data import Samples
from .rows import Rows
from .schema import Recipe
from .scores import training_metrics


@dataclass(frozen=True)
class Prepared:
    """What a trainer of the student is made of."""

    rows: Rows
    teachers: list[nn.Module]
    student: nn.Module
    samples: Samples


def student_trainer(recipe: Recipe, args: SemCKDConfig, prepared: Prepared) -> DistillationTrainer:
    """Return the trainer of the student."""
    teachers = prepared.teachers
    teaching = {"teacher_model": teachers[0] if len(teachers) == 1 else teachers, "feature_loss": recipe.models.method}
    return _trainer(prepared.student, args, prepared.rows, prepared.samples, teaching)


def teacher_trainer(args: SemCKDConfig, model: nn.Module, rows: Rows, samples: Samples) -> DistillationTrainer:
    """Return the trainer of a teacher, which learns from the labels alone."""
    alone = replace(args, logit_weight=0.0, feature_weight=0.0, task_weight=1.0, teacher_cache_dir=None)
    return _trainer(model, alone, rows, samples, {})


def total_steps(args: SemCKDConfig, samples: int, epochs: float, *, limited: bool = True) -> int:
    """Return the optimizer steps of a training over so many samples; `limited`: by `max_steps`, the student's."""
    if limited and args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(samples / (args.train_batch_size * args.world_size))
    return math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * epochs)


def _trainer(
    model: nn.Module, args: SemCKDConfig, rows: Rows, samples: Samples, teaching: Mapping[str, Any]
) -> DistillationTrainer:
    changes: dict[str, Any] = {}
    steps = total_steps(args, len(samples.splits.train), args.num_train_epochs)
    for name in ("logging_steps", "save_steps"):
        if 0 < getattr(args, name) < 1:
            # As a share of all steps it would differ from the number in a checkpoint, of which Trainer warns.
            changes[name] = max(1, math.ceil(getattr(args, name) * steps))
    if rows.kind.lazy:
        changes["remove_unused_columns"] = False  # what a transform makes is all needed
    scores: dict[str, Any] = training_metrics(rows.kind, rows.classes)
    if not scores:
        changes["prediction_loss_only"] = True  # the logits of a vocabulary would fill the memory
    return DistillationTrainer(
        model=model,
        args=replace(args, **changes),
        train_dataset=samples.splits.train,
        eval_dataset=samples.splits.validation,
        data_collator=samples.collator,
        processing_class=samples.processor,
        **scores,
        **teaching,
    )
