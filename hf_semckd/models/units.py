"""Which axes of weights run along the channels, the heads of an attention or the inner units of a block.

Found from the configuration and from names, in several readings; `proof` tells which of them is right.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .channels import QUERY, Channels
from .sizes import Shapes, shapes_of

FUSED = re.compile(r"qkv|query_key_value|in_proj|c_attn|(?:^|_)kv(?:$|_)", re.IGNORECASE)


@dataclass(frozen=True)
class Units:
    """What an axis of a weight runs along: a `group` of `count` units.

    The axis has a section for each of `widths`, with so many entries of every unit; the last `fixed` entries belong to
    no unit and stay.
    """

    group: str
    count: int
    widths: tuple[int, ...] = (1,)
    fixed: int = 0

    def places(self, kept: Tensor) -> Tensor:
        """Return the places on the axis which belong to some of the units, and to none."""
        start, found = 0, []
        for width in self.widths:
            found.append((start + kept.unsqueeze(1) * width + torch.arange(width)).flatten())
            start += self.count * width
        return torch.cat([*found, torch.arange(start, start + self.fixed)])

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum of an axis's values over the entries of every unit."""
        sections = values[: len(values) - self.fixed].split([self.count * width for width in self.widths])
        parts = [part.view(self.count, -1).sum(1) for part in sections]
        return torch.stack(parts).sum(0)


Labels = dict[tuple[str, int], Units]


@dataclass(frozen=True)
class Reading:
    """How fused projections, inner units and heads are read.

    `by_head`: one projection for queries, keys and values gives them head by head, not one after the other;
    `in_turn`: two inner vectors come entry by entry; `whole_block`: inner units belong to the block, not to a numbered
    part of it; `shared_heads`: all attentions order their heads alike, as for one table of positions; `merged`: other
    numbers of the configuration that are equal to the channels count these too.
    """

    by_head: bool
    in_turn: bool
    whole_block: bool
    shared_heads: bool
    merged: bool


READINGS = [Reading(*choice) for choice in itertools.product((False, True), repeat=5)]


def read_axes(model: nn.Module, channels: Channels, own: Shapes, blocks: tuple[str, ...]) -> Iterator[Labels]:
    """Yield the ways to read the axes that are shorter in `own`, the student's shapes; `blocks`: lists of blocks."""
    seen: list[Labels] = []
    for reading in READINGS:
        labels = _labels(model, channels, own, blocks, reading)
        if labels is not None and labels not in seen:
            seen.append(labels)
            yield labels


def _labels(
    model: nn.Module, channels: Channels, own: Shapes, blocks: tuple[str, ...], reading: Reading
) -> Labels | None:
    found: Labels = {}
    inner: dict[str, list[tuple[str, int, int]]] = {}
    shapes, grouped = shapes_of(model), group_counts(model)
    within = tuple(f"{name}." for name in grouped)
    for name, shape in shapes.items():
        for axis, length in enumerate(shape):
            if own[name][axis] == length or (axis == 1 and name.startswith(within)):
                continue
            block = _block_of(name, blocks, reading.whole_block)
            attention = _attention_of(model, name, axis, channels)
            if attention is not None:
                units = _heads(name, length, attention, channels, reading)
                if units is None:
                    return None
                found[name, axis] = units
                continue
            stage = channels.stage_of(name, axis, length, block, reading.merged)
            if stage is not None:
                number, repeats = stage
                found[name, axis] = Units(f"channels {number}", length // repeats, (1,) * repeats)
                continue
            causes = ", ".join(sorted(map(str, channels.causes(name, axis))))
            inner.setdefault(f"inner units of {block or 'the model'} ({causes})", []).append((name, axis, length))
    for group, axes in inner.items():
        count = min(length for _, _, length in axes)
        for name, axis, length in axes:
            if length % count:
                return None
            widths = (length // count,) if reading.in_turn else (1,) * (length // count)
            found[name, axis] = Units(group, count, widths)
    return _in_groups(shapes, found, grouped)


def _block_of(name: str, blocks: tuple[str, ...], whole: bool) -> str:
    """Return the block that a weight is part of, or the innermost numbered part of it that has parts of its own."""
    if whole:
        lists = [entry for entry in blocks if re.match(rf"{re.escape(entry)}\.\d+\.", name)]
        match = re.match(rf"{re.escape(max(lists, key=len))}\.\d+", name) if lists else None
    else:
        match = re.match(r".*\.\d+(?=\.[^.]+\.[^.]+)", name)
    return match.group() if match else ""


def _attention_of(model: nn.Module, name: str, axis: int, channels: Channels) -> str | None:
    """Return the attention along whose heads an axis runs: of what a query, key or value gives, or what is read of it.

    None for any other axis.
    """
    *path, last = name.split(".")
    inside = next((place for place, part in enumerate(path) if "att" in part.lower()), None)
    if inside is None:
        # A table with a column for each head.
        return "" if not channels.grows(name, axis) and channels.is_head_count(name, axis) else None
    attention = ".".join(path[: inside + 1])
    if not channels.grows(name, axis):
        return attention if channels.heads_follow else None
    module = model.get_submodule(".".join(path))
    turned = type(module).__name__ == "Conv1D" and last == "weight"
    gives = axis == (1 if turned else 0) or (len(channels.shapes[name]) > 2 and not isinstance(module, nn.Conv2d))
    if QUERY.search(path[-1]) or QUERY.search(last):
        return attention if gives else None
    reads = (turned or isinstance(module, nn.Linear)) and last == "weight" and not gives
    return attention if reads else None


def _heads(name: str, length: int, attention: str, channels: Channels, reading: Reading) -> Units | None:
    """Return the heads along an axis; where several queries share a key and a value, all of these are one unit."""
    group = "heads" if reading.shared_heads or not attention else f"heads of {attention}"
    heads, count = channels.heads_at(attention)
    width = channels.head_width(attention)
    if channels.by_entry:
        # The heads stay, and each has fewer entries.
        return Units(f"entries of {group}", width, (1,) * (length // width)) if length % width == 0 else None
    queries = heads // count
    fused = any(FUSED.search(part) for part in name.split(".")[-2:])
    if fused and length == (heads + 2) * width and count == heads:
        # One key and one value, which all heads share.
        return Units(group, count, (width,), 2 * width)
    if length % count:
        return None
    each = length // count
    if reading.by_head or not fused or each < width:
        return Units(group, count, (each,))
    if each == (queries + 2) * width:
        return Units(group, count, (queries * width, width, width))
    return Units(group, count, (width,) * (each // width)) if each % width == 0 else None


def _in_groups(shapes: Shapes, labels: Labels, grouped: Mapping[str, int]) -> Labels | None:
    """Make one unit of the channels that have one place in every group that is convolved or normalized by itself."""
    numbers: dict[str, int] = {}
    found = dict(labels)
    for name, number in grouped.items():
        for weight, axis in labels:
            if weight.startswith(f"{name}.") and axis == 0:
                units = labels[weight, 0]
                numbers[units.group] = math.lcm(numbers.get(units.group, 1), number)
                if len(shapes[weight]) > 1 and shapes[weight][1] * number == shapes[weight][0]:
                    found[weight, 1] = units  # what a convolution reads within a group
    for place, units in found.items():
        number = numbers.get(units.group, 1)
        if number > 1 and ({*units.widths} != {1} or units.count % number):
            return None
        if number > 1:
            count = units.count // number
            found[place] = Units(units.group, count, (1,) * (shapes[place[0]][place[1]] // count))
    return found


def groups_of(module: Any) -> int:
    """Return the number of groups that a module convolves or normalizes by themselves."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    return module.groups if isinstance(module, (nn.Conv1d, nn.Conv2d)) else 1


def group_counts(model: nn.Module) -> dict[str, int]:
    """Return the number of groups of each module that has several, of several channels each."""
    counts = {name: groups_of(module) for name, module in model.named_modules()}
    return {name: n for name, n in counts.items() if 1 < n < _channels_of(model.get_submodule(name))}


def group_sizes(model: nn.Module) -> tuple[int, ...]:
    """Return the numbers of channels in these groups."""
    counts = {model.get_submodule(name): count for name, count in group_counts(model).items()}
    return tuple({_channels_of(module) // count for module, count in counts.items()})


def _channels_of(module: Any) -> int:
    return module.num_channels if isinstance(module, nn.GroupNorm) else module.in_channels


def kept_counts(labels: Labels, own: Mapping[str, tuple[int, ...]]) -> dict[str, int] | None:
    """Return how many units of each group a student has; None where its axes do not agree."""
    counts: dict[str, int] = {}
    for (name, axis), units in labels.items():
        count, rest = divmod(own[name][axis] - units.fixed, sum(units.widths))
        if rest or count < 1 or counts.setdefault(units.group, count) != count:
            return None
    return counts
