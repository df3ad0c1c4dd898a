"""What SemCKD keeps of the teacher's features: tokens or pooled maps to compare, and summaries to weigh by."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...features.geometry import (
    Alignment,
    Average,
    as_map,
    as_tokens,
    embedding,
    fitting_mask,
    layer_averages,
    limited_grid,
    summary,
    summary_size,
)
from ...features.layers import FeatureSpec
from ...features.targets import LayerMasks, LayerTarget, TeacherTargets, TokenChoice, layer_mask
from ...features.token_sampling import flat_positions, spread_positions, take_positions

# What the association is computed from: summaries, mean features, or whole features; None: nothing.
AssociationInput = Literal["summary", "mean", "whole"] | None


class KeptTokens(NamedTuple):
    """The tokens that are kept, at `flat` positions (B * K), or all; `unused` (B, K, 1) places hold none."""

    choice: TokenChoice | None
    flat: Tensor | None = None
    unused: Tensor | None = None

    def of(self, tokens: Tensor) -> Tensor:
        """Return these tokens (B, K, C) of a layer (B, N, C)."""
        if self.flat is None:
            return tokens
        kept = take_positions(tokens, self.flat)
        # Fewer tokens than places: an unused place must not hold anybody's.
        return kept if self.unused is None else kept.masked_fill_(self.unused, 0.0)


class TeacherSelection:
    """Keeps the part of the teacher's features that is compared and weighed.

    The rest, by far the most, can be freed before the student runs, and need not be stored in a cache. Layers are
    compared as tokens (sampled, or all of them), as a map (pooled to `max_grid`), or as their mean; maps and means
    also serve as summaries where they are the same. Layers of one layout share their token choice. Without
    `alignments` (S x T) whole features are kept.
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
        self.specs = list(teacher_specs)
        self.kinds = [{row[t].kind for row in alignments} for t in range(len(self.specs))]
        self.association, self.relations = association, relations
        self.max_tokens, self.max_grid = max_tokens, max_grid
        layouts = [(spec.length, spec.prefix, spec.grid, spec.side) for spec in self.specs]
        self.layout = [layouts.index(entry) for entry in layouts]

    @property
    def samples_tokens(self) -> bool:
        """Whether tokens may be left out."""
        return self.max_tokens is not None and any("tokens" in kinds for kinds in self.kinds)

    def describe(self) -> str:
        """Describe what is kept: equal descriptions mean equal tensors for equal features."""
        kinds = [",".join(sorted(kinds)) for kinds in self.kinds]
        tokens = self.max_tokens if self.samples_tokens else None
        grids = self.max_grid if any("grid" in entry for entry in self.kinds) else None
        layouts = [(spec.kind, spec.grid, spec.prefix) for spec in self.specs]
        words = repr((kinds, layouts, self.layout, self.association, tokens, grids))
        return f"{words} embeddings" if self.relations else words

    @torch.no_grad()
    def __call__(
        self, features: Sequence[Tensor], mask: LayerMasks = None, phase: Tensor | None = None
    ) -> TeacherTargets:
        """Return what is needed of T features, with the mask of their tokens; see `FeatureLoss.select`."""
        tokens = dict[tuple[int, int], KeptTokens]()
        layers = []
        for t, (feature, average) in enumerate(zip(features, layer_averages(mask, len(features)), strict=True)):
            kept = self._pooled(t, feature.detach(), average)
            if "tokens" in self.kinds[t]:
                own = as_tokens(feature.detach())
                layout = self.layout[t], own.shape[1]
                if layout not in tokens:
                    tokens[layout] = self._choose(own, fitting_mask(layer_mask(mask, t), feature), phase)
                kept |= {"tokens": tokens[layout].of(own), "choice": tokens[layout].choice}
            layers.append(LayerTarget(**kept))
        whole = any(layer.whole is not None for layer in layers)
        return TeacherTargets(tuple(layers), mask if whole else None)

    def _choose(self, tokens: Tensor, mask: Tensor | None, phase: Tensor | None) -> KeptTokens:
        """Choose among tokens (B, N, C) of which those under the mask (B, N) count."""
        if self.max_tokens is None:
            return KeptTokens(None if mask is None else TokenChoice(mask=mask))
        length = tokens.shape[1]
        positions, chosen = spread_positions(length, self.max_tokens, mask=mask, phase=phase, like=tokens)
        unused = None if chosen is None else ~chosen.unsqueeze(-1)
        return KeptTokens(TokenChoice(positions, chosen, length), flat_positions(positions, length), unused)

    def _pooled(self, t: int, feature: Tensor, average: Average) -> dict[str, Any]:
        """Return what is kept of a layer besides tokens."""
        kept: dict[str, Any] = {}
        spec, kinds = self.specs[t], self.kinds[t]
        if self.association == "whole" or not kinds:
            kept["whole"] = feature
        if "grid" in kinds:
            kept["grid"] = as_map(feature, spec, limited_grid(feature, spec, self.max_grid))
        summarized = self.association == "summary"
        if "mean" in kinds or self.association == "mean" or (summarized and spec.grid is None):
            kept["mean"] = average(feature)
        if self.relations:
            # A first token is a view: kept as it is, it would hold on to all the others.
            kept["embedding"] = embedding(feature, spec, average).clone()
        pooled = kept.get("grid")
        if summarized and spec.grid is not None:
            if pooled is None or tuple(pooled.shape[2:]) != summary_size(spec):
                kept["summary"] = summary(feature, spec, average)
        return kept
