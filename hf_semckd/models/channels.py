"""The channels of a model: which numbers of its configuration count them, stage by stage, and how heads share them."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ConfigurationError, InputError
from .sizes import WIDTH_WORDS, ConfigSize, find_axes, numbers_of, shapes_of

HEAD_WORDS = re.compile(r"(?<!d_)heads?$")
INNER_WORDS = re.compile(r"intermediate|inner|ffn|d_ff|heads?$")
QUERY = re.compile(r"(?:^|_)w?(?:q|k|v|query|key|value)(?:$|_)|qkv|in_proj|c_attn", re.IGNORECASE)
SHARED_WORDS = re.compile(r"key_value|kv|group")
Axes = Mapping[ConfigSize, Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Channels:
    """The channels of a model's stages, as (number of the configuration, channels), and what follows from them.

    `heads`: the numbers of heads; `grouped`: the channels in groups that are convolved or normalized by themselves;
    `heads_follow`: heads share the channels out; `by_entry`: their number stays, and each becomes narrower.
    """

    stages: tuple[tuple[ConfigSize, int], ...]
    axes: Axes
    shapes: Mapping[str, tuple[int, ...]]
    heads: tuple[ConfigSize, ...]
    grouped: tuple[int, ...]
    heads_follow: bool
    by_entry: bool

    @property
    def width(self) -> int:
        """The channels of the last stage, of which `hidden_size` speaks."""
        return self.stages[-1][1]

    @property
    def step(self) -> int:
        """The number whose multiples the channels of the last stage can be."""
        counts = [number.value for number, _ in self.stages] + list(self.grouped)
        if self.heads_follow and not self.by_entry:
            counts += [size.value for size in self.heads if not _stays(size)]
        return self.width // math.gcd(self.width, *counts)

    def causes(self, name: str, axis: int) -> list[ConfigSize]:
        """Return the numbers of the configuration that an axis grows with."""
        return [size for size, axes in self.axes.items() if axis in axes.get(name, ())]

    def grows(self, name: str, axis: int) -> bool:
        """Whether an axis grows with the channels."""
        return any(axis in self.axes[number].get(name, ()) for number, _ in self.stages)

    def stage_of(self, name: str, axis: int, length: int, block: str, merged: bool) -> tuple[str, int] | None:
        """Return the stage whose channels an axis runs along, and how many vectors of them are side by side.

        `merged`: other numbers of the configuration that are equal to the channels count these too.
        """
        own = [(number, width) for number, width in self.stages if axis in self.axes[number].get(name, ())]
        exact = next((stage for stage in own if stage[1] == length), None)
        home = self._home(name)
        if home is not None and own and length != home:
            inside = re.search(r"\.\d+\..*\.\d+\.", name)
            if inside or exact is None or length != 2 * home:
                # Four patches of one stage are joined, and what is as long as a later stage's channels is not these.
                return None if inside or length % home else (f"{own[0][0]} {home}", length // home)
        if exact is not None:
            return f"{exact[0]} {exact[1]}", 1
        if any(size.value == self.width and merged for size in self.causes(name, axis)) and length == self.width:
            return f"{self.stages[-1][0]} {length}", 1
        stem = [size for size in self.causes(name, axis) if "emb" in size.field and size.value == length]
        if stem and not own:
            return f"{stem[0]} {length}", 1
        # Outside of the blocks there may be several vectors of channels side by side.
        if not block and own and length % own[-1][1] == 0:
            return f"{own[-1][0]} {own[-1][1]}", length // own[-1][1]
        return None

    def _home(self, name: str) -> int | None:
        """Return the channels of the stage that a weight is in, where one number counts those of all stages."""
        alone = len(self.stages) > 1 and self.stages[0][0] == self.stages[1][0]
        match = re.search(r"\.(\d+)\.", name)
        place = int(match.group(1)) if match and alone else len(self.stages)
        return self.stages[place][1] if place < len(self.stages) else None

    def is_head_count(self, name: str, axis: int) -> bool:
        """Whether an axis has an entry for each head."""
        return self.heads_follow and self.shapes[name][axis] in {size.value for size in self.heads}

    def stage_of_attention(self, attention: str) -> int:
        """Return the number of the stage that an attention is in."""
        for place, (number, width) in reversed(list(enumerate(self.stages))):
            for name, axes in self.axes[number].items():
                if name.startswith(f"{attention}.") and any(self.shapes[name][axis] == width for axis in axes):
                    return place
        return len(self.stages) - 1

    def heads_at(self, attention: str) -> tuple[int, int]:
        """Return the numbers of heads of an attention, and of the units that they are cut in."""
        queries = [size for size in self.heads if not SHARED_WORDS.search(size.field)]
        shared = [size for size in self.heads if SHARED_WORDS.search(size.field) and not _stays(size)]
        stage = self.stage_of_attention(attention)
        size = next((size for size in queries if size.index in (None, stage)), None)
        if size is None:
            return 1, 1
        fewer = [other.value for other in shared if other.index == size.index and size.value % other.value == 0]
        return size.value, min([size.value, *fewer])

    def head_width(self, attention: str) -> int:
        """Return the number of entries of a head."""
        return max(self.stages[self.stage_of_attention(attention)][1] // self.heads_at(attention)[0], 1)

    def narrower(self, config: Any, width: int) -> Any:
        """Return a configuration with that many channels in the last stage, and as many in proportion elsewhere."""
        if not 0 < width <= self.width or width % self.step:
            raise ConfigurationError(
                "The heads or stages of the teacher do not divide this number of channels",
                received=f"hidden_size={width}, with {', '.join(f'{s}={s.value}' for s in self._divided())}",
                expected=f"a multiple of {self.step}, less than {self.width}",
                todo=f"choose {max(self.step, min(width, self.width) // self.step * self.step)}, for example",
            )
        made = copy.deepcopy(config)
        going = [size for size in self._divided() if not _stays(size)]
        going += [size for size in self.axes if size not in going and not HEAD_WORDS.search(size.field)]
        for size in going:
            size.put(made, max(1, size.value * width // self.width))
        known = {*self.axes, *(partner for size in self.axes for partner in size.partners)}
        for size in {*numbers_of(config, WIDTH_WORDS)} - known:
            # The same number under another name, which nothing is made from.
            if size.value == self.width and not HEAD_WORDS.search(size.field):
                size.put(made, width)
        return made

    def _divided(self) -> list[ConfigSize]:
        heads = self.heads if self.heads_follow and not self.by_entry else ()
        return [*dict.fromkeys(number for number, _ in self.stages), *heads]


def _stays(size: ConfigSize) -> bool:
    """Whether a number of heads stays: a single key and value that all heads share."""
    return size.value == 1 and bool(SHARED_WORDS.search(size.field))


def find_channels(model: nn.Module, grouped: tuple[int, ...]) -> Channels:
    """Return what counts the channels of a model; `grouped`: the channels in groups that a module does not mix."""
    axes, shapes = find_axes(model), shapes_of(model)
    fields: dict[str, set[str]] = {}
    for size, grown in axes.items():
        for each in (size, *size.partners):
            if not INNER_WORDS.search(each.field):
                fields.setdefault(each.field, set()).update(grown)
    field = max(fields, key=lambda name: len(fields[name]), default=None)
    # Many weights run along the channels; else the real number cannot be changed alone.
    if field is None or 4 * len(fields[field]) < len(shapes):
        raise cannot_narrow(model, "its configuration has no number of channels that can be changed alone")
    stages = _stages(model, axes, shapes, field)
    heads = tuple(size for size in numbers_of(model.config, HEAD_WORDS) if _is_shared_out(size, axes, shapes))
    # Queries as long as the channels: both axes of their weights grow with these.
    long = [axes[number].get(name, ()) for name in shapes if _is_query(name) for number, _ in stages]
    follow = bool(heads) and any(len(both) > 1 for both in long)
    queries = [size for size in heads if not SHARED_WORDS.search(size.field)]
    listed = any(size.index is not None for size in queries)
    by_entry = follow and listed and math.gcd(*(size.value for size in queries)) == 1
    found = Channels(stages, axes, shapes, heads, grouped, follow, by_entry)
    if found.step == found.width:
        raise cannot_narrow(model, "fewer channels would change the width of its heads or the number of its groups")
    return found


def _stages(
    model: nn.Module, axes: Axes, shapes: Mapping[str, tuple[int, ...]], field: str
) -> tuple[tuple[ConfigSize, int], ...]:
    """Return the numbers of channels, which a field of the configuration holds, stage by stage."""
    indices = {size: each.index for size in axes for each in (size, *size.partners) if each.field == field}
    numbers = sorted(indices, key=lambda size: indices[size] or 0)
    depths = getattr(model.config, "depths", None)
    if len(numbers) > 1 or not isinstance(depths, (list, tuple)):
        return tuple((size, size.value) for size in numbers)
    lengths = {shapes[name][axis] for name, grown in axes[numbers[0]].items() for axis in grown}
    # Every stage has twice as many channels as the one before.
    doubled = [numbers[0].value * 2**place for place in range(len(depths))]
    return tuple((numbers[0], length) for length in doubled if length in lengths)


def _is_shared_out(size: ConfigSize, axes: Axes, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a number of heads adds no weights, but for keys and values, and tables with a column for each head."""
    lengths = {shapes[name][axis] for name, grown in axes.get(size, {}).items() for axis in grown}
    return bool(SHARED_WORDS.search(size.field)) or lengths <= {size.value}


def _is_query(name: str) -> bool:
    return "att" in name.lower() and any(QUERY.search(part) for part in name.split(".")[-2:])


def cannot_narrow(model: nn.Module, why: str) -> InputError:
    """Return the refusal of a family that cannot be narrowed."""
    return InputError(
        f"{type(model).__name__} cannot be narrowed: {why}",
        received=f"hidden_size for a {type(getattr(model, 'config', None)).__name__}",
        expected="a family whose channels, heads and inner units are known",
        todo="cut its depth (num_layers), or make a narrower student from a configuration of your own",
    )
