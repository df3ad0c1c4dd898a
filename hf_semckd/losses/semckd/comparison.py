"""Comparing the student's layers with the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...features.geometry import Alignment, as_map, common_grid, map_to_tokens
from ...features.layers import FeatureSpec
from ..positions import compared_positions
from ..reduction import squared_error
from .alignment import AlignedStudent


def pairwise_errors(
    projection: nn.ModuleList,
    views: AlignedStudent,
    taught: Sequence[Tensor],
    teacher_specs: Sequence[FeatureSpec],
    alignments: Sequence[Sequence[Alignment]],
    teacher_mask: Tensor | None,
) -> Tensor:
    """Return the mean squared error of every pair (B, S, T).

    Maps are pooled once for all pairs that meet at their size, and kept in the memory layout in which convolutions are
    fastest.

    Args:
        projection: `projection[s][t]`, each a `ConvolutionalProjection`.
        views: The student's features, their specs and mask.
        taught: The teacher's features.
        teacher_specs: The teacher's layers.
        alignments: How each student layer meets each teacher layer.
        teacher_mask: (B, N) mask of the teacher's tokens, or None.
    """
    pooled: dict[tuple[int, tuple[int, int]], Tensor] = {}
    rows = []
    for s, (feature, spec) in enumerate(zip(views.features, views.specs, strict=True)):
        maps: dict[tuple[int, int], Tensor] = {}
        row = []
        for t, target in enumerate(taught):
            net = projection[s][t]  # type: ignore[index]
            dtype = net[0].weight.dtype
            if alignments[s][t].kind != "grid":
                positions, aligned, mask = compared_positions(
                    alignments[s][t], (feature, spec), (target, teacher_specs[t]), views.mask, teacher_mask
                )
                row.append(squared_error(net.project_tokens(positions.to(dtype), mask), aligned, mask))
                continue
            size = common_grid(feature, spec, target, teacher_specs[t])
            if size not in maps:
                own = as_map(feature, spec, size).to(dtype)
                maps[size] = own.contiguous(memory_format=torch.channels_last)
            if (t, size) not in pooled:
                pooled[t, size] = map_to_tokens(as_map(target, teacher_specs[t], size))
            row.append(squared_error(map_to_tokens(net(maps[size])), pooled[t, size]))
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)
