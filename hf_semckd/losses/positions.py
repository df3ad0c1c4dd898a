"""Where two layers meet one to one, and how one is regressed on the other there."""

from __future__ import annotations

from torch import Tensor, nn

from ..features.geometry import Alignment, as_map, as_tokens, both_masks, common_grid, fitting_mask, map_to_tokens
from ..features.layers import FeatureSpec
from ..features.summaries import Average


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
        own, theirs = Average(student_mask)(feature), Average(teacher_mask)(target)
        return own.unsqueeze(1), theirs.unsqueeze(1), None
    mask = both_masks(fitting_mask(student_mask, feature), fitting_mask(teacher_mask, target))
    return as_tokens(feature), as_tokens(target), mask


def regress(regressor: nn.Module, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the regressor's output (..., C_t) for features (..., C_s), computed in the type of its weights.

    Args:
        regressor: A module over the last dimension.
        tokens: (B, N, C_s), or embeddings (B, C_s) without a mask.
        mask: (B, N); positions with 0 are shown to the regressor as zeros, whatever they hold, and get no gradient.
    """
    if mask is not None:
        # Zeroing the error is not enough: the gradient of a weight multiplies it by what the position holds.
        tokens = tokens.masked_fill(mask.unsqueeze(-1) == 0, 0.0)
    return regressor(tokens.to(next(regressor.parameters()).dtype))
