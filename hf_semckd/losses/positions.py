"""Two layers at the same positions: bringing them there, regression of one on the other, means over what counts."""

import torch
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
from ..features.precision import at_least_float32


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


def zero_masked(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Return tokens (B, N, C), zero and without gradient where the mask (B, N) is 0, whatever they hold."""
    return tokens if mask is None else tokens.masked_fill(mask.unsqueeze(-1) == 0, 0.0)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Average (B, N) values over the positions of each sample whose mask is 1; zero where there is none."""
    if mask is None:
        return values.mean(1)
    mask = mask.to(values.dtype)
    # A masked position may hold anything, NaN included (attention over nothing): select, do not multiply.
    kept = torch.where(mask > 0, values, torch.zeros_like(values))
    return kept.sum(1) / mask.sum(1).clamp(min=1)


def squared_error(projected: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared error (B) of tokens (B, N, C), at least in float32: squares overflow half precision.

    Positions whose mask (B, N) is 0 do not count and get no gradient, whatever they hold.
    """
    difference = at_least_float32(projected) - target
    if mask is not None:
        difference.masked_fill_(mask.unsqueeze(-1) == 0, 0.0)
    return masked_mean(difference.square().mean(-1), mask)


def entropy(weights: Tensor) -> Tensor:
    """Return the entropy in nats of weights (..., T): log T when uniform, 0 when all lies on one layer."""
    return torch.special.entr(weights).sum(-1)
