"""What the log of a training tells: curves, the association over time, and the error of each student layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .parts import AssociationHistory, AssociationMap, Curve, LayerError, names_or_numbers
from .reading import read

# The keys under which a trainer's log holds them, beside the names of its numbers.
ASSOCIATION, LAYER_ERRORS = "association", "association_errors"
ENTROPY = "association/entropy"
LOSSES = ("loss", "task_loss", "logit_loss", "feature_loss", "eval_loss")
PARTS = 4
MOST_POINTS = 240
Rows = Sequence[Mapping[str, Any]]


def loss_curves(rows: Rows) -> tuple[Curve, ...]:
    """Return the curves of the loss and its terms, in training and in evaluation, as far as they were logged."""
    return tuple(curve for name in LOSSES if (curve := curve_of(rows, name)) is not None)


def curve_of(rows: Rows, name: str) -> Curve | None:
    """Return a logged number over the steps, or None; of many points, the means of neighbors."""
    found = [(int(row["step"]), float(row[name])) for row in rows if _is_number(row.get(name)) and _has_step(row)]
    if not found:
        return None
    parts = np.array_split(np.array(found), min(len(found), MOST_POINTS))
    return Curve(name, tuple(int(part[-1, 0]) for part in parts), tuple(float(part[:, 1].mean()) for part in parts))


def association_history(
    rows: Rows, student_layers: Sequence[str], teacher_layers: Sequence[str]
) -> AssociationHistory | None:
    """Return the mean association of each quarter of the training, or None where none was logged."""
    windows = _windows(rows)
    if not windows:
        return None
    total = windows[-1][0]
    quarters: dict[int, list[tuple[int, np.ndarray]]] = {}
    for step, weights in windows:
        quarters.setdefault(min((max(step, 1) - 1) * PARTS // max(total, 1), PARTS - 1), []).append((step, weights))
    maps = tuple(
        AssociationMap(entries[0][0], entries[-1][0], _nested(np.mean([weights for _, weights in entries], axis=0)))
        for entries in quarters.values()
    )
    students, teachers = windows[-1][1].shape
    names = names_or_numbers(student_layers, students), names_or_numbers(teacher_layers, teachers)
    return AssociationHistory(*names, maps, curve_of(rows, ENTROPY))


def layer_errors(rows: Rows, student_layers: Sequence[str]) -> tuple[LayerError, ...]:
    """Return the error of each student layer in the first and the last window; a layer that has none is left out."""
    found = [read(tuple[float, ...], row[LAYER_ERRORS], LAYER_ERRORS) for row in rows if LAYER_ERRORS in row]
    if not found or len(found[0]) != len(found[-1]):
        return ()
    names = names_or_numbers(student_layers, len(found[-1]))
    entries = [LayerError(*entry) for entry in zip(names, found[0], found[-1], strict=True)]
    return tuple(entry for entry in entries if math.isfinite(entry.first) and math.isfinite(entry.last))


def _windows(rows: Rows) -> list[tuple[int, np.ndarray]]:
    """Return steps and weights (S, T) of the logging windows, without those of another shape than the last one's."""
    found = []
    for row in rows:
        if ASSOCIATION in row and _has_step(row):
            weights = read(tuple[tuple[float, ...], ...], row[ASSOCIATION], ASSOCIATION)
            if weights and len({len(entry) for entry in weights}) == 1:
                found.append((int(row["step"]), np.array(weights)))
    return [(step, weights) for step, weights in found if weights.shape == found[-1][1].shape]


def _nested(weights: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in weights)


def _has_step(row: Mapping[str, Any]) -> bool:
    return _is_number(row.get("step"))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63
