"""Students made from their teacher: fewer blocks of the same model, starting from the teacher's weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError, InputError
from .cutting import Cut, count_parameters, cut_blocks, fitting_cut
from .importance import Importance, block_order
from .loading import ModelSource, load_model
from .sizes import Depth, find_depths
from .width import narrow

WARM_UP, MEASURED = 3, 15


def make_student(
    teacher: ModelSource,
    *,
    num_layers: int | Sequence[int] | None = None,
    hidden_size: int | None = None,
    parameters: float | None = None,
    latency_ms: float | None = None,
    init: Literal["teacher", "random"] = "teacher",
    importance: Importance = "even",
    batch: Mapping[str, Any] | None = None,
    report: bool = True,
) -> PreTrainedModel:
    """Return a smaller model of the teacher's family, which starts as the teacher with fewer blocks and channels.

    The result is an ordinary model with an ordinary configuration. The teacher, or what it is loaded from, stays.

    Args:
        num_layers: Number of blocks: of the encoder and of the decoder alike, or one number for each of them; of a
            hierarchical model, in all stages together.
        hidden_size: Number of channels; heads keep their width, and the feed-forward layers their ratio to it.
        parameters: Largest share of the teacher's parameters, between 0 and 1, to which blocks are taken away.
        latency_ms: Largest time of a forward pass over `batch`, in milliseconds, measured here; the median of 15.
        init: `teacher` copies the weights that are kept, `random` makes new ones.
        importance: Which blocks are kept. `even`: evenly spaced, from the first to the last; of a stage of a
            hierarchical model, the first ones. `change`: those that change their input most over `batch` (one minus
            the mean cosine of what goes in and what comes out).
        batch: A batch of inputs, for `latency_ms` and `importance`.
        report: Print a table of what was cut.

    Raises `InputError` for a family that cannot be cut, `ConfigurationError` for a budget that cannot be met.

    Example:
        >>> student = make_student(teacher, num_layers=4)  # doctest: +SKIP
    """
    model = load_model(teacher, "teacher")
    if not isinstance(model, PreTrainedModel):
        raise _uncountable(model)
    whole = sum(entry.numel() for entry in model.parameters())
    narrowed = model if hidden_size is None else narrow(model, hidden_size, batch)
    plans = _plans(narrowed, num_layers, importance, batch)
    cut = fitting_cut(narrowed, _within(narrowed, plans, whole, parameters, latency_ms, batch))
    student = cut_blocks(narrowed, cut, init=init)
    if report:
        print(cut.table(model, student))
    return student


def _plans(
    model: PreTrainedModel,
    num_layers: int | Sequence[int] | None,
    importance: Importance,
    batch: Mapping[str, Any] | None,
) -> list[Cut]:
    """Return the cuts that are tried, the largest first."""
    depths = find_depths(model)
    if not depths:
        raise _uncountable(model)
    order = block_order(model, depths, importance, batch)
    tried = (zip(depths, counts, strict=True) for counts in _counts(depths, num_layers))
    return [Cut({depth: order[depth](count) for depth, count in pairs}) for pairs in tried]


def _uncountable(model: nn.Module) -> InputError:
    return InputError(
        f"{type(model).__name__} cannot be cut: no configuration counts its blocks",
        received=f"a configuration of {type(getattr(model, 'config', None)).__name__}",
        expected="a model of transformers whose blocks are in lists, and their number in its configuration",
        todo="make the student by hand",
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
    whole: int,
    parameters: float | None,
    latency_ms: float | None,
    batch: Mapping[str, Any] | None,
) -> Cut:
    """Return the first, and so the largest, of the cuts within the budgets; `whole`: the teacher's parameters."""
    if parameters is None and latency_ms is None:
        return plans[0]
    fitting = [cut for cut in plans if parameters is None or count_parameters(model, cut) <= parameters * whole]
    if not fitting:
        least = count_parameters(model, plans[-1]) / whole
        raise ConfigurationError(
            "No student of this family is as small",
            received=f"parameters={parameters}",
            expected=f"a share of {least:.2f} at least, which the smallest number of blocks has",
            todo=f"set parameters to {least:.2f} or more, or choose a smaller hidden_size",
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
            todo="allow more time, or choose a smaller hidden_size",
        )
    return fitting[first]


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
