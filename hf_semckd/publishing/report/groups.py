"""Layers that belong together: those of one of several teachers, and of the encoder or the decoder of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TEACHER = re.compile(r"teachers\.(\d+)\.")
SIDE = re.compile(r"(?:^|\.)(encoder|decoder)(?:\.|$)")


@dataclass(frozen=True)
class LayerGroup:
    """Some of a list of layers, by their places; without a title where these are all."""

    title: str
    places: tuple[int, ...]


def teacher_groups(names: Sequence[str]) -> list[LayerGroup]:
    """Return the layers of each teacher."""
    return _groups(names, lambda name: f"teacher {match[1]}" if (match := TEACHER.match(name)) else "")


def side_groups(names: Sequence[str]) -> list[LayerGroup]:
    """Return the layers of the encoder and of the decoder; all in one where there is only one of them."""
    sides = [match[1] if (match := SIDE.search(name)) else "" for name in names]
    if not {"encoder", "decoder"} <= {*sides}:
        return [LayerGroup("", tuple(range(len(names))))]
    return _groups(names, lambda name: match[1] if (match := SIDE.search(name)) else "")


def short_names(names: Sequence[str]) -> list[str]:
    """Return names without the beginning and the end that all of them share, at dots: `encoder.layer.3` as `3`."""
    parts = [name.split(".") for name in names]
    if len(names) < 2:
        return list(names)
    most = min(map(len, parts)) - 1
    front = next((n for n in range(most) if len({entry[n] for entry in parts}) > 1), most)
    back = next((n for n in range(most - front) if len({entry[-1 - n] for entry in parts}) > 1), most - front)
    return [".".join(entry[front : len(entry) - back]) for entry in parts]


def _groups(names: Sequence[str], title: Callable[[str], str]) -> list[LayerGroup]:
    found: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        found.setdefault(title(name), []).append(place)
    return [LayerGroup(key, tuple(places)) for key, places in found.items()]
