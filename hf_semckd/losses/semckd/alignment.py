"""Where the student's layers and the teacher's meet: the positions that are compared, each tensor made once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...features.geometry import (
    Alignment,
    as_map,
    as_tokens,
    both_masks,
    common_grid,
    fitting_mask,
    map_to_tokens,
    pool_map,
)
from ...features.layers import FeatureSpec
from ...features.precision import at_least_float32
from ...features.summaries import Average, embedding, summary, summary_size
from ...features.token_sampling import flat_positions, take_positions
from .selection import TeacherSelection


@dataclass(frozen=True)
class PairGroup:
    """Teacher layers of one width that some student layers meet at the same positions.

    Attributes:
        kind: The kind of alignment, see `calibration.Alignment`.
        size: Height and width of the common grid, or None.
        width: Channels of the teacher layers.
        teachers: The teacher layers.
    """

    kind: str
    size: tuple[int, int] | None
    width: int
    teachers: tuple[int, ...]


class AlignedStudent:
    """A student's features at the positions of meetings.

    Args:
        features: S features of the student.
        specs: What they look like.
        mask: (B, N) mask of its tokens.
        selection: Tells how large compared maps are.
        targets: What was selected of the teacher, with the positions of the chosen tokens.
        decoders: What reads the maps of the first layers before they are compared; none for the maps themselves.
    """

    def __init__(
        self,
        features: Sequence[Tensor],
        specs: Sequence[FeatureSpec],
        mask: Tensor | None,
        selection: TeacherSelection,
        targets: Mapping[str, Tensor],
        decoders: Sequence[nn.Module] = (),
    ):
        self.features = features
        self.specs = specs
        self.mask = mask
        self.selection = selection
        self.targets = targets
        self.decoders = decoders
        self._maps: dict[int, Tensor] = {}
        self._decoded: dict[int, Tensor] = {}
        self._means: dict[int, Tensor] = {}
        self._average = Average(mask)
        # By layout and length: layers that look alike share their chosen tokens.
        self._flat: dict[tuple[int, int], Tensor] = {}

    def at(self, s: int, meeting: PairGroup) -> Tensor:
        """Return student layer s as tokens (B, N, C) at the positions of a meeting."""
        if meeting.kind == "mean":
            return self.mean(s).unsqueeze(1)
        if meeting.size is not None:
            return map_to_tokens(pool_map(self.decoded(s), meeting.size))
        tokens, first = as_tokens(self.features[s]), meeting.teachers[0]
        positions = self.selection.positions_of(self.targets, first)
        if positions is None:
            return tokens
        place = (self.selection.layout[first], tokens.shape[1])
        if place not in self._flat:
            self._flat[place] = flat_positions(positions, tokens.shape[1])
        return _with_late_backward(take_positions(tokens, self._flat[place]), self.features[s])

    def map(self, s: int) -> Tensor:
        """Return student layer s as a map of the size that maps are compared at."""
        if s not in self._maps:
            feature, spec = self.features[s], self.specs[s]
            pooled = as_map(feature, spec, self.selection.grid_size(feature, spec))
            self._maps[s] = _with_late_backward(pooled, feature)
        return self._maps[s]

    def decoded(self, s: int) -> Tensor:
        """Return what is compared of a student layer's map: what its decoder reads in it, or the map itself."""
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
            self._means[s] = _with_late_backward(self._average(self.features[s]), self.features[s])
        return self._means[s]

    def embedding(self, s: int) -> Tensor:
        """Return the vector (B, C) that stands for a sample in student layer s."""
        feature = self.features[s]
        return _with_late_backward(embedding(feature, self.specs[s], self._average), feature)

    def summary(self, s: int, shown: bool) -> Tensor:
        """Return what similarities are taken on (B, D), without gradient.

        Args:
            s: The student layer.
            shown: Whether its map takes part in a meeting, and so is made anyway.
        """
        feature, spec = self.features[s].detach(), self.specs[s]
        if spec.grid is not None and shown and self.selection.grid_size(feature, spec) == summary_size(feature, spec):
            return at_least_float32(self.map(s).detach().flatten(1))
        return summary(feature, spec, self._average)

    def mask_at(self, s: int, meeting: PairGroup) -> Tensor | None:
        """Return the mask (B, N) of the positions that count for both models, or None.

        Args:
            s: One of the meeting's student layers.
            meeting: The meeting.
        """
        if meeting.kind != "tokens":
            return None
        first = meeting.teachers[0]
        theirs, own = self.selection.mask_of(self.targets, first), fitting_mask(self.mask, self.features[s])
        positions = self.selection.positions_of(self.targets, first)
        if own is not None and positions is not None:
            own = own.gather(1, positions)
        return both_masks(theirs, own)


def find_pair_groups(
    views: AlignedStudent, alignments: Sequence[Sequence[Alignment]], teacher_specs: Sequence[FeatureSpec]
) -> dict[PairGroup, list[int]]:
    """Return the student layers of each meeting; every pair of layers is in exactly one."""
    meetings: dict[PairGroup, list[int]] = {}
    for s, row in enumerate(alignments):
        groups: dict[tuple[str, tuple[int, int] | None, int], list[int]] = {}
        for t, (alignment, spec) in enumerate(zip(row, teacher_specs, strict=True)):
            size = None
            if alignment.kind == "grid":
                size = common_grid(views.map(s), views.specs[s], views.targets[f"grid.{t}"], spec)
            groups.setdefault((alignment.kind, size, spec.channels), []).append(t)
        for (kind, size, width), teachers in groups.items():
            meetings.setdefault(PairGroup(kind, size, width, tuple(teachers)), []).append(s)
    return meetings


def _with_late_backward(derived: Tensor, source: Tensor) -> Tensor:
    """Return `derived`, whose backward waits until that of `source` is due, and not a moment before.

    The gradient of a few tokens or cells fills a tensor as large as the layer. Autograd runs what was made last first,
    so that without this those of all layers would be there at once, while all of the student's activations still are.
    Only the order of work changes: where the order cannot be set, nothing does.
    """
    node: Any = derived.grad_fn
    last: Any = source.grad_fn
    if torch.compiler.is_compiling() or last is None or not hasattr(last, "_set_sequence_nr"):
        return derived
    while node is not None and node is not last:
        node._set_sequence_nr(last._sequence_nr())
        node = next((entry for entry, _ in node.next_functions if entry is not None), None)
    return derived
