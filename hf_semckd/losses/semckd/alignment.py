"""Both models' features as they are compared: the positions that student and teacher layers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...features.geometry import (
    Alignment,
    Average,
    as_map,
    as_tokens,
    both_masks,
    common_grid,
    embedding,
    fitting_mask,
    layer_averages,
    limited_grid,
    map_to_tokens,
    pool_map,
    summary,
    summary_size,
)
from ...features.layers import FeatureSpec
from ...features.precision import at_least_float32
from ...features.statistics import ChannelStatistics, standardization
from ...features.targets import LayerMasks, TeacherTargets, TokenChoice, layer_mask, required
from ...features.token_sampling import flat_positions, take_positions


@dataclass(frozen=True)
class PairGroup:
    """Teacher layers of one width that are compared at the same positions; `kind` is that of their `Alignment`s."""

    kind: str
    size: tuple[int, int] | None
    width: int
    teachers: tuple[int, ...]


@dataclass(frozen=True)
class AlignedTeacher:
    """The teacher's kept features as they are compared, raw or standardized by the statistics of each layer."""

    targets: TeacherTargets
    specs: Sequence[FeatureSpec]
    statistics: Sequence[ChannelStatistics] = ()

    def mask(self, t: int) -> Tensor | None:
        """Return the mask (B, N) of the tokens of layer t where whole features are kept."""
        return layer_mask(self.targets.mask, t)

    def at(self, t: int, group: PairGroup) -> Tensor:
        """Return layer t as tokens (B, N, C) at the positions of a group, in the teacher's own units."""
        layer = self.targets.layers[t]
        if group.kind == "mean":
            return required(layer.mean).unsqueeze(1)
        if group.size is not None:
            return map_to_tokens(pool_map(self.map(t), group.size))
        return required(layer.tokens)

    def map(self, t: int) -> Tensor:
        """Return layer t as a map of the size that maps are kept at."""
        return required(self.targets.layers[t].grid)

    def choice(self, t: int) -> TokenChoice:
        """Return which tokens are kept of layer t."""
        return self.targets.layers[t].choice or TokenChoice()

    def summary(self, t: int) -> Tensor:
        """Return the vectors (B, D) that similarities of layer t are computed from."""
        layer, spec = self.targets.layers[t], self.specs[t]
        if layer.whole is not None:
            return summary(layer.whole, spec, Average(self.mask(t)))
        if layer.summary is not None:
            return at_least_float32(layer.summary)
        return at_least_float32(required(layer.mean if spec.grid is None else layer.grid).flatten(1))

    def mean(self, t: int) -> Tensor:
        """Return the average (B, C) of layer t over its positions, standardized."""
        layer = self.targets.layers[t]
        mean = required(layer.mean) if layer.whole is None else Average(self.mask(t))(layer.whole)
        return self.standardized(t, mean.unsqueeze(1)).squeeze(1)

    def embedding(self, t: int) -> Tensor:
        """Return the vector (B, C) that stands for a sample in layer t."""
        return required(self.targets.layers[t].embedding)

    def standardized(self, t: int, values: Tensor) -> Tensor:
        """Return values of layer t in units of their statistics, or raw without any; at least in float32."""
        return self.statistics[t](values) if self.statistics else at_least_float32(values)

    def standardization(self, teachers: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """Return mean and scale (T', C) of some layers of one width, or None for raw targets."""
        return standardization([self.statistics[t] for t in teachers]) if self.statistics else (None, None)

    def values(self, t: int) -> tuple[Tensor, Tensor | None]:
        """Return the values (B, N, C) or (B, C, h, w) that layer t's statistics are taken from, and their mask."""
        layer = self.targets.layers[t]
        if layer.tokens is not None:
            return layer.tokens, self.choice(t).mask
        if layer.grid is not None:
            return layer.grid, None
        if layer.mean is not None:
            return layer.mean.unsqueeze(1), None
        whole = self.targets.whole(t)
        return (as_tokens(whole) if whole.dim() == 2 else whole), fitting_mask(self.mask(t), whole)


@dataclass
class AlignedStudent:
    """A student's features as they are compared; tensors that pairs share are computed once.

    `masks` are those of its tokens, and `teacher` knows the positions of the kept ones. `compared_as_map` tells
    for each layer whether its map is compared; `decoders` read the maps of the first layers before; both may be empty.
    """

    features: Sequence[Tensor]
    specs: Sequence[FeatureSpec]
    masks: LayerMasks
    teacher: AlignedTeacher
    max_grid: int | None = None
    compared_as_map: Sequence[bool] = ()
    decoders: Sequence[nn.Module] = ()

    def __post_init__(self) -> None:
        self._maps: dict[int, Tensor] = {}
        self._decoded: dict[int, Tensor] = {}
        self._means: dict[int, Tensor] = {}
        # Layers of one layout and length share their chosen tokens.
        self._flat: dict[tuple[TokenChoice, int], Tensor] = {}
        self._averages = layer_averages(self.masks, len(self.specs))

    def mask(self, s: int) -> Tensor | None:
        """Return the mask (B, N) of the tokens of student layer s."""
        return layer_mask(self.masks, s)

    def with_features(self, features: Sequence[Tensor]) -> AlignedStudent:
        """Return the same layers with other features."""
        return replace(self, features=features)

    def at(self, s: int, group: PairGroup) -> Tensor:
        """Return student layer s as tokens (B, N, C) at the positions of a group."""
        if group.kind == "mean":
            return self.mean(s).unsqueeze(1)
        if group.size is not None:
            return map_to_tokens(pool_map(self.decoded(s), group.size))
        tokens, choice = as_tokens(self.features[s]), self.teacher.choice(group.teachers[0])
        length = self.teacher.at(group.teachers[0], group).shape[1] if choice.positions is None else choice.length
        if length not in (None, tokens.shape[1]):
            raise InputError(
                f"Layer `{self.specs[s].name}` has another number of tokens than the teacher's layers",
                received=f"{tokens.shape[1]} of the student, {length} of the teacher",
                expected="the same tokens, as when the loss was built",
                todo="give both models the same tokens, or build the loss with tokens_aligned=False",
            )
        if choice.positions is None:
            return tokens
        place = (choice, tokens.shape[1])
        if place not in self._flat:
            self._flat[place] = flat_positions(choice.positions, tokens.shape[1])
        return _with_late_backward(take_positions(tokens, self._flat[place]), self.features[s])

    def map(self, s: int) -> Tensor:
        """Return student layer s as a map of the size that maps are compared at."""
        if s not in self._maps:
            feature, spec = self.features[s], self.specs[s]
            pooled = as_map(feature, spec, limited_grid(feature, spec, self.max_grid))
            self._maps[s] = _with_late_backward(pooled, feature)
        return self._maps[s]

    def decoded(self, s: int) -> Tensor:
        """Return the output of a student layer's decoder for its map, or the map itself."""
        if not self.decoders:
            return self.map(s)
        if s not in self._decoded:
            decoder = self.decoders[s]
            maps = self.map(s).to(next(decoder.parameters()).dtype)
            self._decoded[s] = decoder(maps.contiguous(memory_format=torch.channels_last))
        return self._decoded[s]

    def mean(self, s: int) -> Tensor:
        """Return the average of student layer s over its positions (B, C)."""
        if s not in self._means:
            self._means[s] = _with_late_backward(self._averages[s](self.features[s]), self.features[s])
        return self._means[s]

    def embedding(self, s: int) -> Tensor:
        """Return the vector (B, C) that stands for a sample in student layer s."""
        feature = self.features[s]
        return _with_late_backward(embedding(feature, self.specs[s], self._averages[s]), feature)

    def summary(self, s: int) -> Tensor:
        """Return the vectors (B, D) that similarities of layer s are computed from, without gradient."""
        feature, spec = self.features[s].detach(), self.specs[s]
        size = None if spec.grid is None else limited_grid(feature, spec, self.max_grid)
        if self.compared_as_map and self.compared_as_map[s] and size == summary_size(spec):
            return at_least_float32(self.map(s).detach().flatten(1))
        return summary(feature, spec, self._averages[s])

    def mask_at(self, s: int, group: PairGroup) -> Tensor | None:
        """Return the mask (B, N) of the positions of a group that count for both student layer s and the teacher."""
        if group.kind != "tokens":
            return None
        choice, own = self.teacher.choice(group.teachers[0]), fitting_mask(self.mask(s), self.features[s])
        if own is not None and choice.positions is not None:
            own = own.gather(1, choice.positions)
        return both_masks(choice.mask, own)


def find_pair_groups(student: AlignedStudent, alignments: Sequence[Sequence[Alignment]]) -> dict[PairGroup, list[int]]:
    """Return the student layers of each group; every pair of layers, aligned so, is in exactly one."""
    found: dict[PairGroup, list[int]] = {}
    for s, row in enumerate(alignments):
        groups: dict[tuple[str, tuple[int, int] | None, int], list[int]] = {}
        for t, (alignment, spec) in enumerate(zip(row, student.teacher.specs, strict=True)):
            size = None
            if alignment.kind == "grid":
                size = common_grid(student.map(s), student.specs[s], student.teacher.map(t), spec)
            groups.setdefault((alignment.kind, size, spec.channels), []).append(t)
        for (kind, size, width), teachers in groups.items():
            found.setdefault(PairGroup(kind, size, width, tuple(teachers)), []).append(s)
    return found


def _with_late_backward(derived: Tensor, source: Tensor) -> Tensor:
    """Return `derived`, whose backward is scheduled right before that of `source`.

    The gradient of a few tokens or cells fills a tensor as large as the layer. Autograd runs the latest node first:
    without this, these gradients of all layers would exist at once, while all of the student's activations still do.
    Only the order of work changes; where it cannot be set, nothing does.
    """
    node: Any = derived.grad_fn
    last: Any = source.grad_fn
    if torch.compiler.is_compiling() or last is None or not hasattr(last, "_set_sequence_nr"):
        return derived
    while node is not None and node is not last:
        node._set_sequence_nr(last._sequence_nr())
        node = next((entry for entry, _ in node.next_functions if entry is not None), None)
    return derived
