"""Students made from their teacher: fewer blocks of the same model, starting from the teacher's weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError, InputError
from .loading import ModelSource, load_model
from .outputs import first_tensor
from .sizes import Depth, empty_like, find_depths, shallower, shapes_of

Importance = Literal["even", "change"]
WARM_UP, MEASURED = 3, 15


def make_student(
    teacher: ModelSource,
    *,
    num_layers: int | Sequence[int] | None = None,
    parameters: float | None = None,
    latency_ms: float | None = None,
    init: Literal["teacher", "random"] = "teacher",
    importance: Importance = "even",
    batch: Mapping[str, Any] | None = None,
    report: bool = True,
) -> PreTrainedModel:
    """Return a smaller model of the teacher's family, which starts as the teacher with fewer blocks.

    The result is an ordinary model with an ordinary configuration. With nothing cut it gives the teacher's outputs.

    Args:
        teacher: A model, or a name or folder to load it from; it is left as it is.
        num_layers: Number of blocks: of the encoder and of the decoder alike, or one number for each of them; of a
            hierarchical model, in all stages together.
        parameters: Largest share of the teacher's parameters, between 0 and 1.
        latency_ms: Largest time of a forward pass over `batch`, in milliseconds, measured here; the median of 15.
        init: `teacher` copies the weights of the blocks that are kept, `random` makes new ones.
        importance: Which blocks are kept. `even`: evenly spaced, from the first to the last; of a stage of a
            hierarchical model, the first ones. `change`: those that change their input most over `batch` (one minus
            the mean cosine of what goes in and what comes out).
        batch: A batch of inputs, for `latency_ms` and `importance`.
        report: Print a table of what was cut.

    Raises:
        ConfigurationError: For budgets that cannot be met, with what is possible.
        InputError: For a model that is no `PreTrainedModel`, or whose family cannot be cut.

    Example:
        >>> student = make_student(teacher, num_layers=4)  # doctest: +SKIP
        >>> trainer = SemCKDTrainer(student, args, teacher_model=teacher, train_dataset=data)  # doctest: +SKIP
    """
    model = load_model(teacher, "teacher")
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            "A student can be made from a model of transformers alone",
            received=type(model).__name__,
            expected="a PreTrainedModel, which has a configuration",
            todo="make the student by hand, and pass it to the trainer",
        )
    depths = find_depths(model)
    if not depths:
        raise InputError(
            f"{type(model).__name__} cannot be cut: its configuration counts no blocks",
            received=f"a configuration of {type(model.config).__name__}",
            expected="a family whose blocks are in lists, and their number in the configuration",
            todo="make the student by hand",
        )
    order = _block_order(model, depths, importance, batch)
    plans = [
        Cut({d: order[d](n) for d, n in zip(depths, counts, strict=True)}) for counts in _counts(depths, num_layers)
    ]
    cut = _fitting(model, _within(model, plans, parameters, latency_ms, batch))
    student = cut_blocks(model, cut, init=init)
    if report:
        print(cut.table(model, student))
    return student


@dataclass(frozen=True)
class Cut:
    """Which blocks of a model's lists are kept: {depth: numbers of the kept blocks, in order}."""

    kept: Mapping[Depth, tuple[int, ...]]

    def table(self, teacher: nn.Module, student: nn.Module) -> str:
        """Return what was kept, and how many parameters that leaves."""
        before, after = (sum(entry.numel() for entry in model.parameters()) for model in (teacher, student))
        rows = [("size", "teacher", "student", "kept")]
        for depth, kept in self.kept.items():
            rows.append((str(depth.size), str(depth.size.value), str(len(kept)), ", ".join(map(str, kept))))
        rows.append(("parameters", f"{before:,}", f"{after:,}", f"{after / before:.0%}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def even_blocks(count: int, kept: int) -> tuple[int, ...]:
    """Return the numbers of blocks that are kept of `count`, evenly spaced from the first to the last."""
    if kept == 1:
        return (0,)
    return tuple(round(place * (count - 1) / (kept - 1)) for place in range(kept))


def cut_blocks(teacher: PreTrainedModel, cut: Cut, init: Literal["teacher", "random"] = "teacher") -> PreTrainedModel:
    """Return a new model of the teacher's class with some of its blocks; the teacher is left as it is.

    `init` is `teacher` for its weights, `random` for new ones. Raises `InputError` when the family cannot be cut so
    that it loads again.
    """
    kind: Any = type(teacher)
    student = kind(_config(teacher, cut)).to(dtype=teacher.dtype, device=teacher.device)
    _check_reload(student)
    if init == "random":
        return student.train(teacher.training)
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
    return student.train(teacher.training)


def _config(model: PreTrainedModel, cut: Cut) -> Any:
    config: Any = model.config
    for depth, kept in cut.kept.items():
        config = shallower(config, depth.size, kept)
    return config


def _fitting(model: PreTrainedModel, cut: Cut) -> Cut:
    """Return a cut whose blocks have the weights that the student's have at their places.

    Where blocks differ by their number (a first one that halves the resolution, every second one with experts), the
    nearest of the right kind is taken.
    """
    made = empty_like(model, _config(model, cut))
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


def _check_reload(student: PreTrainedModel) -> None:
    """Refuse a student whose configuration, saved and read again, describes another model."""
    kind: Any = type(student.config)
    again = empty_like(student, kind.from_dict(student.config.to_dict()))
    if again is None or shapes_of(again) != shapes_of(student):
        raise InputError(
            f"{type(student).__name__} cannot be cut: its configuration does not keep what was cut",
            received=f"a configuration of {kind.__name__} that describes another model when it is read again",
            expected="a configuration that says how many blocks there are",
            todo="make the student by hand, or start it at random (init='random')",
        )


def _counts(depths: Sequence[Depth], num_layers: int | Sequence[int] | None) -> list[tuple[int, ...]]:
    """Return the numbers of blocks that are tried, the most first: as asked for, or every share of all."""
    sizes = [depth.size.value for depth in depths]
    staged = all(depth.size.index is not None for depth in depths)
    if num_layers is None:
        whole = sum(sizes)
        shares = [_spread(sizes, total) for total in range(whole, len(sizes) - 1, -1)]
        return list(dict.fromkeys(shares))
    if isinstance(num_layers, int):
        asked = _spread(sizes, num_layers) if staged else tuple(num_layers for _ in sizes)
    else:
        asked = tuple(num_layers)
    if len(asked) != len(sizes) or any(not 1 <= n <= size for n, size in zip(asked, sizes, strict=False)):
        named = ", ".join(f"{depth.size}={depth.size.value}" for depth in depths)
        raise ConfigurationError(
            "The teacher has no such number of blocks",
            received=f"num_layers={num_layers} for {named}",
            expected=f"a number from {len(sizes) if staged else 1} to {sum(sizes) if staged else min(sizes)}, or one "
            "for each of these",
            todo="choose a number in this range",
        )
    return [asked]


def _spread(sizes: Sequence[int], total: int) -> tuple[int, ...]:
    """Distribute a number of blocks over lists in proportion to their lengths, at least one for each."""
    counts = [max(1, total * size // sum(sizes)) for size in sizes]
    while sum(counts) < total:
        gaps = [total * size / sum(sizes) - count for size, count in zip(sizes, counts, strict=True)]
        counts[gaps.index(max(gaps))] += 1
    return tuple(counts)


def _within(
    model: PreTrainedModel,
    plans: Sequence[Cut],
    parameters: float | None,
    latency_ms: float | None,
    batch: Mapping[str, Any] | None,
) -> Cut:
    """Return the first, and so the largest, of the cuts that keeps the budgets."""
    if parameters is None and latency_ms is None:
        return plans[0]
    whole = sum(entry.numel() for entry in model.parameters())
    fitting = [cut for cut in plans if parameters is None or _parameters(model, cut) <= parameters * whole]
    if not fitting:
        least = _parameters(model, plans[-1]) / whole
        raise ConfigurationError(
            "No student of this family is as small",
            received=f"parameters={parameters}",
            expected=f"a share of {least:.2f} at least, which the smallest number of blocks has",
            todo=f"set parameters to {least:.2f} or more, or make a narrower student from a configuration of your own",
        )
    if latency_ms is None:
        return fitting[0]
    if batch is None:
        raise ConfigurationError(
            "A latency is measured on a batch, and there is none",
            received=f"latency_ms={latency_ms}, batch=None",
            expected="inputs of the size that the student will get",
            todo="pass batch=..., such as a tokenizer's output for one text",
        )
    # Time falls with every block that goes: half of what is left is tried each time.
    first, last, times = 0, len(fitting) - 1, {}
    while first < last:
        middle = (first + last) // 2
        times[middle] = measure_latency(cut_blocks(model, fitting[middle], init="random"), batch)
        first, last = (first, middle) if times[middle] <= latency_ms else (middle + 1, last)
    least = times.get(first) or measure_latency(cut_blocks(model, fitting[first], init="random"), batch)
    if least > latency_ms:
        raise ConfigurationError(
            "No student of this family is as fast on this machine",
            received=f"latency_ms={latency_ms}",
            expected=f"{least:.1f} ms at least, which the smallest student takes for this batch",
            todo="allow more time, or make a narrower student from a configuration of your own",
        )
    return fitting[first]


def _parameters(model: PreTrainedModel, cut: Cut) -> int:
    made = empty_like(model, _config(model, cut))
    return sum(entry.numel() for entry in (model if made is None else made).parameters())


@torch.no_grad()
def measure_latency(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """Return the median time of a forward pass in milliseconds, after a few that warm up."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    times = []
    for run in range(WARM_UP + MEASURED):
        started = time.perf_counter()
        model(**inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if run >= WARM_UP:
            times.append(1000 * (time.perf_counter() - started))
    model.train(was_training)
    return statistics.median(times)


def _block_order(
    model: PreTrainedModel, depths: Sequence[Depth], importance: Importance, batch: Mapping[str, Any] | None
) -> dict[Depth, Callable[[int], tuple[int, ...]]]:
    """Return for each list the function from a number of blocks to those that are kept."""
    if importance == "even":
        # In a stage the first block changes the resolution, and windows are shifted in every second one.
        orders = {depth: partial(even_blocks, depth.size.value) for depth in depths}
        return {depth: order if depth.size.index is None else _first_blocks for depth, order in orders.items()}
    if batch is None:
        raise ConfigurationError(
            "The importance of blocks is measured on a batch, and there is none",
            received=f"importance={importance!r}, batch=None",
            expected="a calibration batch of inputs",
            todo="pass batch=..., or leave importance at 'even'",
        )
    return {depth: partial(_largest, block_changes(model, depth, batch)) for depth in depths}


def _first_blocks(kept: int) -> tuple[int, ...]:
    return tuple(range(kept))


def _largest(values: Sequence[float], kept: int) -> tuple[int, ...]:
    ranked = sorted(range(len(values)), key=lambda block: (-values[block], block))
    return tuple(sorted(ranked[:kept]))


@torch.no_grad()
def block_changes(model: nn.Module, depth: Depth, batch: Mapping[str, Any]) -> list[float]:
    """Return how much each block changes its input: one minus the mean cosine of its input and its output.

    Source: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024.
    """
    found: dict[int, float] = {}

    def note(block: int, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before, after = first_tensor((*args, *kwargs.values())), first_tensor(output)
        if before is not None and after is not None and before.shape == after.shape:
            found[block] = 1.0 - float(F.cosine_similarity(before.float(), after.float(), dim=-1).mean())

    was_training = model.training
    with ExitStack() as hooks:
        for block in range(depth.size.value):
            module = model.get_submodule(f"{depth.lists[0]}.{block}")
            hooks.enter_context(module.register_forward_hook(partial(note, block), with_kwargs=True))
        model.eval()(**batch)
    model.train(was_training)
    if len(found) < depth.size.value or len(depth.lists) > 1:
        raise InputError(
            f"The importance of the blocks of {type(model).__name__} cannot be measured",
            received=f"{len(found)} of {depth.size.value} blocks that return what they were given, changed",
            expected="blocks that take hidden states and return hidden states of the same size",
            todo="leave importance at 'even'",
        )
    return [found[block] for block in range(depth.size.value)]
