"""The sizes of a model: which numbers of its configuration count the blocks of which lists, or the axes of weights.

Found by changing one number at a time, and building the model without memory (on the meta device): the blocks that are
gone then, and the axes that have grown, belong to that number.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..data.views import preserved_random_state

WIDTH_WORDS = re.compile(
    r"hidden_size|hidden_dim|^dim$|embd|emb_dim|embed_dim|embedding_size|embed_proj_dim|d_model|ffn|d_ff|inner|"
    r"intermediate|groups_width|heads?$"
)
DEPTH_WORDS = re.compile(r"layer|depth|block")
# Numbers that count no blocks, whatever they are called: those of a sound's convolutions, and of stages.
OTHER_WORDS = re.compile(
    r"feat_extract|encoder_blocks|vocab|image|patch|kernel|window|position|label|token_id|_id$|bucket|dropout|prob|max_"
)
# Fields with an entry for every block.
LISTED_WORDS = re.compile(r"layer|attention|type|block|mlp|rope")
LARGEST_DEPTH = 512

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ConfigSize:
    """A number of a configuration: the field's name, and the place in it where the field is a list.

    `partners` are numbers that must be equal to it.
    """

    field: str
    index: int | None
    value: int
    partners: tuple[ConfigSize, ...] = ()

    def put(self, config: Any, value: int) -> None:
        """Write another value into a configuration."""
        for partner in self.partners:
            partner.put(config, value)
        if self.index is None:
            setattr(config, self.field, value)
            return
        entries = list(getattr(config, self.field))
        entries[self.index] = value
        setattr(config, self.field, entries)

    def __str__(self) -> str:
        return self.field if self.index is None else f"{self.field}[{self.index}]"


@dataclass(frozen=True)
class Depth:
    """A number of blocks, and the lists of modules that have so many: names in front of the number of a block.

    `fields` are those of the configuration that have an entry for every block.
    """

    size: ConfigSize
    lists: tuple[str, ...]
    fields: tuple[str, ...] = ()


def empty_like(model: nn.Module, config: Any) -> nn.Module | None:
    """Return a model of the same class without memory for its weights; None where the configuration cannot work."""
    kind: Any = type(model)
    try:
        with preserved_random_state(0), torch.device("meta"):
            return kind(config)
    except Exception:  # a model refuses sizes that do not fit together in ways of its own
        return None


def count_parameters(model: nn.Module) -> int:
    """Return the number of a model's parameters."""
    return sum(entry.numel() for entry in model.parameters())


def shapes_of(model: nn.Module) -> Shapes:
    """Return the shape of every parameter and buffer that is saved."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def find_depths(model: nn.Module) -> list[Depth]:
    """Return the numbers of blocks in a model's configuration, in the order of its modules."""
    found, own = [], shapes_of(model)
    for size in numbers_of(model.config, DEPTH_WORDS):
        if not 2 <= size.value <= LARGEST_DEPTH:
            continue
        # A list may have as many entries by chance, or for another number.
        for fields in dict.fromkeys((_listed_fields(model.config, size), ())):
            cut = empty_like(model, shallower(model.config, Depth(size, (), fields), range(size.value - 1)))
            left = {} if cut is None else shapes_of(cut)
            lists = {_list_of(name, size.value - 1, left) for name in own if name not in left}
            if cut is not None and lists and None not in lists:
                found.append(Depth(size, tuple(sorted(filter(None, lists))), fields))
                break
    names = list(own)
    return sorted(found, key=lambda depth: next(i for i, name in enumerate(names) if name.startswith(depth.lists[0])))


def _list_of(name: str, last: int, left: Shapes) -> str | None:
    """Return the list whose block `last`, which holds a weight, is not among the weights that are left."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        block = ".".join(parts[: place + 1])
        if part == str(last) and not any(other.startswith(f"{block}.") for other in left):
            return ".".join(parts[:place])
    return None


def _listed_fields(config: Any, size: ConfigSize) -> tuple[str, ...]:
    """Return the fields of a configuration that may have an entry for every block."""
    named = [(name, value) for name, value in config.to_dict().items() if LISTED_WORDS.search(name)]
    lists = [name for name, value in named if isinstance(value, (list, tuple)) and len(value) == size.value]
    return tuple(name for name in lists if name != size.field and size.index is None)


def shallower(config: Any, depth: Depth, kept: Sequence[int]) -> Any:
    """Return a copy of a configuration for some of its blocks: their number, and the lists with an entry for each."""
    made = copy.deepcopy(config)
    for field in depth.fields:
        setattr(made, field, [getattr(config, field)[place] for place in kept])
    depth.size.put(made, len(kept))
    if not hasattr(made, "stage_names"):
        return made
    # A backbone names a stage for every block, when its configuration is made.
    stages = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")
    return type(made).from_dict({name: value for name, value in made.to_dict().items() if name not in stages})


def numbers_of(config: Any, words: re.Pattern[str]) -> Iterator[ConfigSize]:
    """Yield the positive numbers of a configuration whose fields are called so."""
    for field, value in config.to_dict().items():
        if not words.search(field) or OTHER_WORDS.search(field):
            continue
        for index, entry in enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]:
            if isinstance(entry, int) and not isinstance(entry, bool) and entry > 0:
                yield ConfigSize(field, index, entry)


def find_axes(model: nn.Module) -> dict[ConfigSize, dict[str, tuple[int, ...]]]:
    """Return the axes of weights that grow with each number of a model's configuration: {number: {weight: axes}}.

    Where a model works only with two numbers that are equal, or is another one without, they are one number with a
    partner.
    """
    found: dict[ConfigSize, dict[str, tuple[int, ...]]] = {}
    numbers, tied = list(numbers_of(model.config, WIDTH_WORDS)), set[ConfigSize]()
    own = shapes_of(model)
    for size in numbers:
        if size in tied:
            continue
        others = [other for other in numbers if other.value == size.value and other != size and other not in found]
        for partners in ((), *((other,) for other in others), tuple(others)):
            number = replace(size, partners=partners)
            axes = _grown(model, number, own)
            if axes is not None:
                tied.update(partners)
                found[number] = axes
                break
    return {size: axes for size, axes in found.items() if axes and size not in tied}


def _grown(model: nn.Module, size: ConfigSize, own: Shapes) -> dict[str, tuple[int, ...]] | None:
    """Return the axes that grow with a number; None where the model is another one then, or none."""
    config: Any = copy.deepcopy(model.config)
    size.put(config, 2 * size.value)
    grown = empty_like(model, config)
    shapes = {} if grown is None else shapes_of(grown)
    if shapes.keys() != own.keys():
        return None
    changed = {name: tuple(i for i, n in enumerate(shapes[name]) if n > shape[i]) for name, shape in own.items()}
    return {name: axes for name, axes in changed.items() if axes}
