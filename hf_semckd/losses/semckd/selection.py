"""What of the teacher's features a loss needs: tokens or pooled maps to compare, and summaries to weigh them by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...features.geometry import Alignment, as_map, as_tokens, fitting_mask, limited_grid, map_to_tokens, pool_map
from ...features.layers import FeatureSpec
from ...features.summaries import Average, embedding, summary, summary_size
from ...features.token_sampling import flat_positions, spread_positions, take_positions

# What the association is computed from: summaries (similarity), mean features (learned), everything (published).
AssociationInput = Literal["summary", "mean", "whole"] | None


class Places(NamedTuple):
    """Where the chosen tokens of a layout lie (B * K), and which of the places (B, K, 1) stay free; None: none."""

    flat: Tensor
    free: Tensor | None


class TeacherSelection:
    """Takes out of the teacher's features what is compared and weighed, right after the teacher's forward.

    The rest, by far the most, can be freed before the student runs, and need not be stored in a cache. What is kept is
    a flat mapping of tensors, by kind and teacher layer:

    - `tokens.t` (B, K, C): the chosen tokens of layer t, at `positions.l` (B, K) where l is the first layer of the
      same layout, and with the mask `mask.l` (B, K). Without sampling there are no positions, and all tokens.
    - `grid.t` (B, C, h, w): the map of layer t, pooled to at most `max_grid` rows and columns.
    - `mean.t` (B, C): the average over its tokens or cells.
    - `embedding.t` (B, C): the vector that stands for a sample, `calibration.embedding`, for relations.
    - `summary.t` (B, D): what similarities are taken on, where it is none of the above.
    - `whole.t`, `mask`: everything, and the teacher's token mask.

    Args:
        teacher_specs: The teacher's T layers.
        alignments: How each student layer meets each teacher layer, S x T; empty for whole features only.
        association: What the weights are computed from, or None for fixed weights.
        max_tokens: Most tokens of a sample that are compared, or None for all.
        max_grid: Largest height and width of compared maps, or None.
        relations: Whether relations between samples are compared.
    """

    def __init__(
        self,
        teacher_specs: Sequence[FeatureSpec],
        alignments: Sequence[Sequence[Alignment]],
        association: AssociationInput,
        max_tokens: int | None = None,
        max_grid: int | None = None,
        relations: bool = False,
    ):
        self.relations = relations
        self.specs = list(teacher_specs)
        self.kinds = [{row[t].kind for row in alignments} for t in range(len(self.specs))]
        self.association = association
        self.max_tokens = max_tokens
        self.max_grid = max_grid
        layouts = [(spec.length, spec.prefix, spec.grid) for spec in self.specs]
        self.layout = [layouts.index(entry) for entry in layouts]

    @property
    def samples_tokens(self) -> bool:
        """Whether tokens may be left out."""
        return self.max_tokens is not None and any("tokens" in kinds for kinds in self.kinds)

    def describe(self) -> str:
        """Say what is kept; equal words mean equal tensors for equal features."""
        kinds = [",".join(sorted(kinds)) for kinds in self.kinds]
        tokens = self.max_tokens if self.samples_tokens else None
        grids = self.max_grid if any("grid" in entry for entry in self.kinds) else None
        layouts = [(spec.kind, spec.grid, spec.prefix) for spec in self.specs]
        words = repr((kinds, layouts, self.layout, self.association, tokens, grids))
        return f"{words} embeddings" if self.relations else words

    @torch.no_grad()
    def __call__(
        self, features: Sequence[Tensor], mask: Tensor | None = None, phase: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return what is needed of a batch.

        Args:
            features: T features of the teacher.
            mask: (B, N) mask of its tokens.
            phase: (B) in [0, 1), where in each sample the choice of tokens begins; None for its first token.
        """
        kept: dict[str, Tensor] = {}
        average, places = Average(mask), dict[tuple[int, int], Places]()
        for t, (feature, spec) in enumerate(zip(features, self.specs, strict=True)):
            feature = feature.detach()
            if self.association == "whole" or not self.kinds[t]:
                kept[f"whole.{t}"] = feature
            if "tokens" in self.kinds[t]:
                self._keep_tokens(kept, t, feature, fitting_mask(mask, feature), phase, places)
            if "grid" in self.kinds[t]:
                kept[f"grid.{t}"] = as_map(feature, spec, self.grid_size(feature, spec))
            if "mean" in self.kinds[t] or self.association == "mean":
                kept[f"mean.{t}"] = average(feature)
            if self.relations:
                # A first token is a view: kept as it is, it would hold on to all the others.
                kept[f"embedding.{t}"] = embedding(feature, spec, average).clone()
            if self.association == "summary":
                self._keep_summary(kept, t, feature, average)
        if mask is not None and any(name.startswith("whole.") for name in kept):
            kept["mask"] = mask
        return kept

    def grid_size(self, feature: Tensor, spec: FeatureSpec) -> tuple[int, int]:
        """Return the height and width that a layer's map is compared at, before it meets a smaller one."""
        return limited_grid(feature, spec, self.max_grid)

    def summary_of(self, targets: Mapping[str, Tensor], t: int) -> Tensor:
        """Return the summary (B, D) of teacher layer t, wherever it was kept."""
        if f"summary.{t}" in targets:
            return targets[f"summary.{t}"]
        name = f"mean.{t}" if self.specs[t].grid is None else f"grid.{t}"
        return targets[name].flatten(1)

    def positions_of(self, targets: Mapping[str, Tensor], t: int) -> Tensor | None:
        """Return the positions (B, K) of the tokens that were chosen for layer t, or None where all are kept."""
        return targets.get(f"positions.{self.layout[t]}")

    def mask_of(self, targets: Mapping[str, Tensor], t: int) -> Tensor | None:
        """Return the mask (B, K) of layer t's kept tokens, or None where all count."""
        return targets.get(f"mask.{self.layout[t]}")

    def at(self, targets: Mapping[str, Tensor], t: int, size: tuple[int, int] | None, kind: str) -> Tensor:
        """Return layer t as tokens (B, N, C) at the positions of a meeting, in the teacher's own units."""
        if kind == "mean":
            return targets[f"mean.{t}"].unsqueeze(1)
        if size is not None:
            return map_to_tokens(pool_map(targets[f"grid.{t}"], size))
        return targets[f"tokens.{t}"]

    def values_of(self, targets: Mapping[str, Tensor], t: int) -> tuple[Tensor, Tensor | None]:
        """Return the values (B, N, C) or (B, C, h, w) that layer t's statistics are taken from, and their mask."""
        if f"tokens.{t}" in targets:
            return targets[f"tokens.{t}"], self.mask_of(targets, t)
        if f"grid.{t}" in targets:
            return targets[f"grid.{t}"], None
        if f"mean.{t}" in targets:
            return targets[f"mean.{t}"].unsqueeze(1), None
        whole = targets[f"whole.{t}"]
        return (as_tokens(whole) if whole.dim() == 2 else whole), fitting_mask(targets.get("mask"), whole)

    def _keep_tokens(
        self,
        kept: dict[str, Tensor],
        t: int,
        feature: Tensor,
        mask: Tensor | None,
        phase: Tensor | None,
        places: dict[tuple[int, int], Places],
    ) -> None:
        tokens, first = as_tokens(feature), self.layout[t]
        if self.max_tokens is None:
            kept[f"tokens.{t}"] = tokens
            if mask is not None:
                kept[f"mask.{first}"] = mask
            return
        place = (first, tokens.shape[1])
        if place not in places:
            positions, chosen = spread_positions(tokens.shape[1], self.max_tokens, mask=mask, phase=phase, like=tokens)
            kept[f"positions.{first}"] = positions
            if chosen is not None:
                kept[f"mask.{first}"] = chosen
            left = None if chosen is None else ~chosen.unsqueeze(-1)
            places[place] = Places(flat_positions(positions, tokens.shape[1]), left)
        tokens = take_positions(tokens, places[place].flat)
        free = places[place].free
        if free is not None:
            # Fewer tokens than places: what stands there must not be anybody's.
            tokens.masked_fill_(free, 0.0)
        kept[f"tokens.{t}"] = tokens

    def _keep_summary(self, kept: dict[str, Tensor], t: int, feature: Tensor, average: Average) -> None:
        spec = self.specs[t]
        if spec.grid is None:
            if f"mean.{t}" not in kept:
                kept[f"mean.{t}"] = average(feature)
            return
        grid = kept.get(f"grid.{t}")
        if grid is None or tuple(grid.shape[2:]) != summary_size(feature, spec):
            kept[f"summary.{t}"] = summary(feature, spec, average)
