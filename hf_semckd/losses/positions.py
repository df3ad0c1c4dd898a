"""Where two layers meet one to one, and which ones do in a map made by hand."""

from __future__ import annotations

from torch import Tensor

from ..calibration import Alignment, as_map, as_mean, as_tokens, common_grid
from ..features import FeatureSpec
from ..functional import map_to_tokens
from .selection import both_masks, fitting_mask


def compared_positions(
    alignment: Alignment,
    student: tuple[Tensor, FeatureSpec],
    teacher: tuple[Tensor, FeatureSpec],
    student_mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return both layers as tokens (B, N, C) at the same positions, and the mask (B, N) of those that count.

    Maps and image tokens of different sizes are pooled to the smaller grid; sequences that do not match position by
    position are averaged to one.

    Args:
        alignment: How the two layers meet.
        student: The student layer's output and what it looks like.
        teacher: The same of the teacher layer.
        student_mask: (B, N) mask of the student's tokens.
        teacher_mask: (B, N) mask of the teacher's tokens.
    """
    (feature, spec), (target, target_spec) = student, teacher
    if alignment.kind == "grid":
        size = common_grid(feature, spec, target, target_spec)
        return map_to_tokens(as_map(feature, spec, size)), map_to_tokens(as_map(target, target_spec, size)), None
    if alignment.kind == "mean":
        own, theirs = fitting_mask(student_mask, feature), fitting_mask(teacher_mask, target)
        return as_mean(feature, own).unsqueeze(1), as_mean(target, theirs).unsqueeze(1), None
    mask = both_masks(fitting_mask(student_mask, feature), fitting_mask(teacher_mask, target))
    return as_tokens(feature), as_tokens(target), mask


def skip_map(students: int, teachers: int) -> list[int]:
    """Return which teacher layer each student layer is paired with by hand: the last with the last, evenly below.

    Args:
        students: S >= 1.
        teachers: T >= 1.
    """
    # ceil((s + 1) * T / S) - 1 in whole numbers.
    return [max(-(-(s + 1) * teachers // students) - 1, 0) for s in range(students)]
