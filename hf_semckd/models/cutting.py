"""Cutting blocks out of a model: another configuration, and the weights of the blocks that are kept."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..data.views import preserved_random_state
from ..errors import InputError
from .sizes import Depth, empty_like, shallower, shapes_of


@dataclass(frozen=True)
class Cut:
    """Which blocks of a model's lists are kept: {depth: numbers of the kept blocks, in order}."""

    kept: Mapping[Depth, tuple[int, ...]]

    def __hash__(self) -> int:
        return hash(tuple(self.kept.items()))


def cut_config(config: Any, cut: Cut) -> Any:
    """Return a copy of a configuration for the blocks that are kept."""
    for depth, kept in cut.kept.items():
        config = shallower(config, depth, kept)
    return config


def new_model(teacher: PreTrainedModel, config: Any) -> PreTrainedModel:
    """Return a model of the teacher's class and device with new weights, which loads as it is.

    Each tensor has the precision of the teacher's, buffers that are not saved (rotary frequencies) included.
    """
    kind: Any = type(teacher)
    student = kind(copy.deepcopy(config)).to(device=teacher.device)
    theirs = dict([*teacher.named_parameters(), *teacher.named_buffers()])
    for name, entry in [*student.named_parameters(), *student.named_buffers()]:
        if name in theirs:
            entry.data = entry.data.to(theirs[name].dtype)
    check_kept_config(student)
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.train(teacher.training)


def cut_blocks(teacher: PreTrainedModel, cut: Cut) -> PreTrainedModel:
    """Return a new model of the teacher's class with some of its blocks; the teacher is left as it is.

    Raises `InputError` when the family cannot be cut so that it loads again.
    """
    with preserved_random_state(0):
        student = new_model(teacher, cut_config(teacher.config, cut))
    weights, own = teacher.state_dict(), student.state_dict()
    source = {name: _name_in_teacher(name, cut) for name in own}
    wrong = [name for name, other in source.items() if other not in weights or weights[other].shape != own[name].shape]
    if wrong:
        raise InputError(
            f"{type(teacher).__name__} cannot be cut: some weights have no counterpart in the teacher",
            received=f"no weights for {', '.join(wrong[:3])}",
            expected="blocks in lists that the configuration counts",
            todo="make the student by hand, or start it at random (init='random')",
        )
    student.load_state_dict({name: weights[other] for name, other in source.items()})
    return student


def fitting_cut(model: PreTrainedModel, cut: Cut) -> Cut:
    """Return a cut whose blocks have the weights that the student's have at their places.

    Where blocks differ by their number (a first one that halves the resolution, every second one with experts), the
    nearest of the right kind is taken.
    """
    made = empty_like(model, cut_config(model.config, cut))
    if made is None:
        return cut
    theirs, own = shapes_of(model), shapes_of(made)
    fitted = {}
    for depth, kept in cut.kept.items():
        taken: list[int] = []
        for place, wanted in enumerate(kept):
            kind = _block_shapes(own, depth, place)
            known = [block for block in range(depth.size.value) if _block_shapes(theirs, depth, block) == kind]
            later = [block for block in known if not taken or block > taken[-1]] or [wanted]
            taken.append(min(later, key=lambda block, wanted=wanted: abs(block - wanted)))  # type: ignore[misc]
        fitted[depth] = tuple(taken)
    return Cut(fitted)


def _block_shapes(shapes: Mapping[str, tuple[int, ...]], depth: Depth, block: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of a block, by their names without its number."""
    found = {}
    for prefix in depth.lists:
        for name, shape in shapes.items():
            head, number, rest = _split(name, prefix)
            if number == block:
                found[head + rest] = shape
    return found


def _name_in_teacher(name: str, cut: Cut) -> str:
    """Return the teacher's name of a student's weight: blocks have other numbers there."""
    for depth, kept in cut.kept.items():
        for prefix in depth.lists:
            head, number, rest = _split(name, prefix)
            if number is not None and number < len(kept):
                return f"{head}{kept[number]}{rest}"
    return name


def _split(name: str, prefix: str) -> tuple[str, int | None, str]:
    """Split a weight's name at the number of its block in a list."""
    start = f"{prefix}."
    if not name.startswith(start):
        return name, None, ""
    number, dot, rest = name[len(start) :].partition(".")
    return (start, int(number), dot + rest) if number.isdigit() else (name, None, "")


def check_kept_config(student: PreTrainedModel) -> None:
    """Refuse a student whose configuration, saved and read again, describes another model."""
    kind: Any = type(student.config)
    try:
        again = empty_like(student, kind.from_dict(student.config.to_dict()))
    except Exception:  # a configuration refuses what it was given, in ways of its own
        again = None
    if again is None or shapes_of(again) != shapes_of(student):
        raise InputError(
            f"{type(student).__name__} cannot be cut: its configuration does not keep what was cut",
            received=f"a configuration of {kind.__name__} that describes another model when it is read again",
            expected="a configuration that says how many blocks there are",
            todo="make the student by hand, or start it at random (init='random')",
        )
