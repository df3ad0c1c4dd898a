"""What is decided about a training before its first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..models.tasks import Task


@dataclass(frozen=True)
class Plan:
    """Which terms are minimized, and on what.

    Attributes:
        shifts_labels: Whether position n predicts label n + 1 (causal language models).
        label_names: Columns of a batch that hold labels.
        student_computes_loss: Whether the student's forward takes labels and returns their loss.
        classes: Number of classes of a classifier of whole samples; None for any other head.
        task_weight, logit_weight, feature_weight: Weights of the terms; with 0 a term is not computed.
    """

    task: Task
    shifts_labels: bool
    label_names: tuple[str, ...]
    student_computes_loss: bool
    classes: int | None
    temperature: float
    task_weight: float
    logit_weight: float
    feature_weight: float
    distils_features: bool

    @property
    def distils_logits(self) -> bool:
        """Whether the logit term is on."""
        return self.logit_weight > 0

    def labels_of(self, batch: Mapping[str, Any]) -> Any:
        """Return a batch's labels, whatever their column is called, or None."""
        return next((batch[name] for name in ("labels", *self.label_names) if name in batch), None)

    def with_labels(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the batch with its labels under the usual name, where a plain model calls them otherwise."""
        labels = None if "labels" in batch or self.student_computes_loss else self.labels_of(batch)
        return batch if labels is None else {**batch, "labels": labels}
