"""Two layers at the same positions, and the regression of one on the other."""

from torch import Tensor, nn

from ..features.geometry import (
    Alignment,
    Average,
    as_map,
    as_tokens,
    both_masks,
    common_grid,
    fitting_mask,
    map_to_tokens,
)
from ..features.layers import FeatureSpec
from .reduction import zero_masked


def compared_positions(
    alignment: Alignment,
    student: tuple[Tensor, FeatureSpec],
    teacher: tuple[Tensor, FeatureSpec],
    student_mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return both layers as tokens (B, N, C) at the same positions, and the mask (B, N) of those that count."""
    (feature, spec), (target, target_spec) = student, teacher
    if alignment.kind == "grid":
        size = common_grid(feature, spec, target, target_spec)
        return map_to_tokens(as_map(feature, spec, size)), map_to_tokens(as_map(target, target_spec, size)), None
    if alignment.kind == "mean":
        return Average(student_mask)(feature).unsqueeze(1), Average(teacher_mask)(target).unsqueeze(1), None
    mask = both_masks(fitting_mask(student_mask, feature), fitting_mask(teacher_mask, target))
    return as_tokens(feature), as_tokens(target), mask


def regress(regressor: nn.Module, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the regressor's output (..., C_t) for features (..., C_s), computed in the type of its weights.

    Masked positions enter as zeros: zeroing their error alone would leave a weight's gradient of 0 times the feature.
    """
    return regressor(zero_masked(tokens, mask).to(next(regressor.parameters()).dtype))
