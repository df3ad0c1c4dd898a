"""Alignment of two layers: the positions at which both can be compared, and one vector for all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .layers import FeatureSpec
from .precision import at_least_float32, full_precision
from .targets import LayerMasks, layer_mask

# Larger maps are pooled to this before similarities: coarse positions matter, single pixels do not.
SUMMARY_GRID = 4


@dataclass(frozen=True)
class Alignment:
    """The alignment of a student layer and a teacher layer, of one of these kinds.

    `tokens`: position by position; `grid`: both become maps, the larger pooled to the smaller one's grid; `mean`: both
    are averaged over their positions (different tokenizations, or a vector).
    """

    kind: Literal["tokens", "grid", "mean"]

    @classmethod
    def of(cls, student: FeatureSpec, teacher: FeatureSpec, tokens_aligned: bool) -> Alignment:
        """Return the alignment of a pair; tokens are aligned where position n of both stands for the same input."""
        both_tokens = student.kind == teacher.kind == "tokens"
        same_layout = (student.length, student.prefix, student.grid) == (teacher.length, teacher.prefix, teacher.grid)
        if student.side != teacher.side:
            return cls("mean")
        if both_tokens and same_layout and tokens_aligned:
            return cls("tokens")
        if student.grid is not None and teacher.grid is not None:
            return cls("grid")
        return cls("mean")


def common_grid(
    student: Tensor, student_spec: FeatureSpec, teacher: Tensor, teacher_spec: FeatureSpec
) -> tuple[int, int]:
    """Return the smaller height and the smaller width of two layers that are maps or have a grid."""
    first, second = grid_of(student, student_spec), grid_of(teacher, teacher_spec)
    return min(first[0], second[0]), min(first[1], second[1])


def grid_of(feature: Tensor, spec: FeatureSpec) -> tuple[int, int]:
    """Return the (height, width) of a map, or of the patches among image tokens."""
    if feature.dim() == 4:
        return int(feature.shape[2]), int(feature.shape[3])
    assert spec.grid is not None
    return spec.grid


def limited_grid(feature: Tensor, spec: FeatureSpec, limit: int | None) -> tuple[int, int]:
    """Return `grid_of` a layer, but at most `limit` rows and columns; None for no limit."""
    height, width = grid_of(feature, spec)
    return (height, width) if limit is None else (min(height, limit), min(width, limit))


def as_map(feature: Tensor, spec: FeatureSpec, size: tuple[int, int]) -> Tensor:
    """Return a layer's output as a map (B, C, *size). Raises `InputError` for another number of tokens than before."""
    if feature.dim() == 4:
        return pool_map(feature, size)
    if feature.shape[1] != spec.length:
        raise InputError(
            f"Layer `{spec.name}` has another number of image tokens than at the start",
            received=f"{feature.shape[1]} tokens",
            expected=f"{spec.length}: {spec.prefix} in front of a grid of {grid_of(feature, spec)}",
            todo="use one image size for all batches",
        )
    grid = grid_of(feature, spec)
    return pool_tokens(feature[:, spec.prefix : spec.prefix + grid[0] * grid[1]], grid, size)


def as_tokens(feature: Tensor) -> Tensor:
    """Return a layer's output as (B, N, C)."""
    if feature.dim() == 4:
        return map_to_tokens(feature)
    return feature.unsqueeze(1) if feature.dim() == 2 else feature


def pool_map(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool maps (B, C, H, W) to a (height, width) that is not larger; the same tensor when it is equal."""
    if tuple(features.shape[-2:]) == tuple(size):
        return features
    return F.adaptive_avg_pool2d(features, size)


def map_to_tokens(features: Tensor) -> Tensor:
    """Turn a map (B, C, H, W) into tokens (B, H * W, C), row by row."""
    return features.flatten(2).transpose(1, 2)


def pool_tokens(features: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Average-pool tokens (B, H * W, C) that lie on a grid (H, W) to a map (B, C, height, width) that is not larger.

    As one matrix product: transposing to a map first would cost far more.
    """
    if tuple(grid) == tuple(size):
        return features.transpose(1, 2).unflatten(2, grid)
    cells = torch.eye(grid[0] * grid[1], dtype=at_least_float32(features[:0]).dtype, device=features.device)
    shares = F.adaptive_avg_pool2d(cells.unflatten(1, grid).unsqueeze(1), size).flatten(1).T
    with full_precision(features):
        return (shares.to(features.dtype) @ features).transpose(1, 2).unflatten(2, size)


def both_masks(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Return the mask of the positions that count in both masks; None where there is none."""
    if first is None or second is None:
        return second if first is None else first
    return (first != 0) & (second != 0)


def fitting_mask(mask: Tensor | None, feature: Tensor) -> Tensor | None:
    """Return the mask (B, N) of a feature's tokens (B, N, C); None for a map, a vector, or tokens of other samples.

    Where a model has pooled its tokens, one counts if any of those that went into it does.
    """
    if mask is None or feature.dim() != 3 or len(mask) != len(feature) or feature.shape[1] > mask.shape[1]:
        return None
    if feature.shape[1] == mask.shape[1]:
        return mask
    return F.adaptive_max_pool1d((mask != 0).float().unsqueeze(1), feature.shape[1]).squeeze(1) != 0


class Average:
    """Averages layers' outputs over their positions; terms of the mask alone are computed once.

    Positions whose mask (B, N) is 0 do not count, whatever they hold; see `fitting_mask`. None: all count.
    """

    def __init__(self, mask: Tensor | None = None):
        self.mask = mask
        self._parts: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, feature: Tensor) -> Tensor:
        """Return the average (B, C) of (B, C, H, W), (B, N, C) or (B, C); under the mask at least in float32."""
        if feature.dim() == 4:
            return feature.mean((2, 3))
        if feature.dim() == 2:
            return feature
        kind = feature.shape[1], at_least_float32(feature[:0]).dtype
        if kind not in self._parts:
            mask = fitting_mask(self.mask, feature)
            if mask is None:
                return feature.mean(1)
            counted = mask != 0
            self._parts[kind] = ~counted.unsqueeze(-1), counted.sum(1, keepdim=True).clamp(min=1).to(kind[1])
        left_out, count = self._parts[kind]
        # In half precision the sum of a long sequence overflows, though its mean would not.
        return feature.masked_fill(left_out, 0.0).sum(1, dtype=kind[1]) / count


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
    own, theirs = as_tokens(feature), as_tokens(target)
    if own.shape[1] != theirs.shape[1]:
        raise InputError(
            f"Layers `{spec.name}` and `{target_spec.name}` have different numbers of tokens",
            received=f"{own.shape[1]} of the student, {theirs.shape[1]} of the teacher",
            expected="the same tokens, as when the loss was built",
            todo="give both models the same tokens, or build the loss with tokens_aligned=False",
        )
    return own, theirs, both_masks(fitting_mask(student_mask, feature), fitting_mask(teacher_mask, target))


def layer_averages(masks: LayerMasks, count: int) -> list[Average]:
    """Return the average of each of so many layers; layers that share a mask share it."""
    own = [layer_mask(masks, index) for index in range(count)]
    shared = {id(mask): Average(mask) for mask in own}
    return [shared[id(mask)] for mask in own]


def embedding(feature: Tensor, spec: FeatureSpec, average: Average) -> Tensor:
    """Return the vector (B, C) that a classifier would read of a layer: the first token (CLS), or else the average."""
    return feature[:, 0] if feature.dim() == 3 and spec.prefix > 0 else average(feature)


def summary(feature: Tensor, spec: FeatureSpec, average: Average) -> Tensor:
    """Return (B, C * cells) to compute similarities from: a small map for images, the mean token for text."""
    if spec.grid is None:
        return at_least_float32(average(feature))
    return at_least_float32(as_map(feature, spec, summary_size(spec)).flatten(1))


def summary_size(spec: FeatureSpec) -> tuple[int, int]:
    """Return the height and width of the map in a summary of a layer with a grid."""
    assert spec.grid is not None
    return min(spec.grid[0], SUMMARY_GRID), min(spec.grid[1], SUMMARY_GRID)


def summary_width(spec: FeatureSpec) -> int:
    """Return the number of values in a layer's summary."""
    return spec.channels * (1 if spec.grid is None else math.prod(summary_size(spec)))
