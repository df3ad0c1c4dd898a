"""The quality that is logged while a recipe trains; the table at the end is by `evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.columns import IGNORED
from .classes import Classes
from .tasks.base import Task


def training_metrics(task: type[Task], classes: Classes | None) -> dict[str, Callable[..., Any]]:
    """Return `compute_metrics` and `preprocess_logits_for_metrics` for a trainer; nothing for language models."""
    if classes is None and task.name != "question-answering":
        return {}
    if classes is not None and classes.kind == "regression":
        return {"compute_metrics": _correlation, "preprocess_logits_for_metrics": _first}
    decide = _positive if classes is not None and classes.kind == "multi" else _largest
    return {"compute_metrics": _spans if classes is None else _accuracy, "preprocess_logits_for_metrics": decide}


def _first(logits: Any, labels: Any) -> Tensor:
    return logits[0] if isinstance(logits, tuple) else logits


def _largest(logits: Any, labels: Any) -> Tensor:
    """Return decisions, of spans both ends: all logits of a data set would not fit into memory."""
    if isinstance(labels, tuple):
        return torch.stack([end.argmax(-1) for end in logits[:2]], dim=-1)
    return _first(logits, labels).argmax(-1)


def _positive(logits: Any, labels: Any) -> Tensor:
    return (_first(logits, labels) > 0).long()


def _accuracy(found: Any) -> dict[str, float]:
    counted = found.label_ids != IGNORED
    return {"accuracy": float((found.predictions == found.label_ids)[counted].mean())}


def _spans(found: Any) -> dict[str, float]:
    right = np.stack(found.label_ids, axis=-1) == found.predictions
    return {"exact_match": float(right.all(-1).mean())}


def _correlation(found: Any) -> dict[str, float]:
    with np.errstate(invalid="ignore"):
        return {"pearson": float(np.corrcoef(found.predictions.reshape(-1), found.label_ids.reshape(-1))[0, 1])}
