"""Students made from their teacher: fewer blocks and channels of the same model, starting from its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError, InputError
from .budgets import Budget, Size, SizeSearch
from .cutting import Cut, cut_blocks, fitting_cut, new_model
from .importance import Importance, block_order
from .loading import ModelSource, load_model
from .sizes import Depth, count_parameters, find_depths
from .tables import aligned_lines
from .width import narrow


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
    """Return a smaller model of the family of the teacher, which stays: the same with fewer blocks and channels.

    Args:
        num_layers: Number of blocks: of the encoder and of the decoder alike, or one number for each of them; of a
            hierarchical model, in all stages together.
        hidden_size: Number of channels, of the last stage of a hierarchical model; other stages and feed-forward
            layers keep their ratio to it, and heads keep their width. Those are kept that contribute most to what is
            read of them over `batch`, or without one, that have the largest weights.
        parameters: Largest share of the teacher's parameters, in (0, 1]. What is not given goes as far as needed:
            blocks down to a third of them, then channels, then both.
        latency_ms: Largest median time of a forward pass over `batch`, in milliseconds, measured here.
        init: `teacher` copies the weights that are kept, `random` makes new ones.
        importance: Which blocks are kept. `even`: evenly spaced, from the first to the last; of a stage of a
            hierarchical model, the first ones. `change`: those that change their input most over `batch` (one minus
            the mean cosine of both). `loss`: those without which the loss on `batch`, with labels, rises most.
        batch: A calibration batch of inputs.
        report: Whether to print a table of what was cut.

    Raises `InputError` for a family that cannot be cut, `ConfigurationError` for a budget that cannot be met.

    Example:
        >>> student = make_student(teacher, num_layers=4)  # doctest: +SKIP
    """
    _check(num_layers, hidden_size, init)
    budget = Budget(parameters, latency_ms, batch)
    model = _plain_teacher(load_model(teacher, "teacher"))
    plans = _plans(model, num_layers, importance, batch, optional=hidden_size is not None or bool(budget))
    search = SizeSearch(model, plans, hidden_size, budget)
    size, bound = search.choose() if budget else (Size(plans[0], hidden_size), "")
    cut = fitting_cut(model, size.cut)
    student = _unnamed(new_model(model, search.config(size))) if init == "random" else cut_blocks(model, cut)
    if init == "teacher" and size.width is not None:
        student = narrow(student, size.width, batch)
    if report:
        by = "weights" if batch is None else "activations times weights"
        width = None if size.width is None else (search.whole_width, size.width)
        print(_table(model, student, cut, width, "" if init == "random" else f"those with the largest {by}", bound))
    return student


def _check(num_layers: Any, hidden_size: Any, init: str) -> None:
    numbers = [*num_layers] if isinstance(num_layers, Sequence) else [num_layers]
    wrong = [number for number in (*numbers, hidden_size) if number is not None and type(number) is not int]
    if wrong or init not in ("teacher", "random"):
        raise ConfigurationError(
            "A student is described by whole numbers, and starts at its teacher or at random",
            received=f"num_layers={num_layers!r}, hidden_size={hidden_size!r}, init={init!r}",
            expected="an int, or several for num_layers; init='teacher' or 'random'",
            todo="convert the numbers with int(...)" if wrong else "choose one of both",
        )


def _unnamed(student: PreTrainedModel) -> PreTrainedModel:
    """Return a new model that is not said to start from the weights of the one whose configuration it has."""
    student.config._name_or_path = student.name_or_path = ""
    return student


def _plain_teacher(model: nn.Module) -> PreTrainedModel:
    """Return the teacher, whose weights can be copied; `InputError` for one that is wrapped or quantized."""
    if hasattr(model, "get_base_model") or hasattr(model, "peft_config"):
        raise _no_teacher(model, "it has adapters (PEFT)", "call merge_and_unload() on it, and pass what that returns")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise _no_teacher(model, "it is quantized", "load it without quantization_config, or call dequantize() on it")
    if not isinstance(model, PreTrainedModel):
        raise _uncountable(model)
    return model


def _no_teacher(model: nn.Module, why: str, todo: str) -> InputError:
    return InputError(
        f"{type(model).__name__} cannot be cut: {why}",
        received=type(model).__name__,
        expected="a model of transformers with plain weights",
        todo=todo,
    )


def _table(
    teacher: nn.Module, student: nn.Module, cut: Cut, width: tuple[int, int] | None, by: str, bound: str
) -> str:
    """Return what was kept and why, and how many parameters that leaves."""
    rows = [("size", "teacher", "student", "kept")]
    for depth, kept in cut.kept.items():
        rows.append((str(depth.size), str(depth.size.value), str(len(kept)), ", ".join(map(str, kept))))
    if width is not None:
        rows.append(("hidden_size", str(width[0]), str(width[1]), by))
    before, after = count_parameters(teacher), count_parameters(student)
    rows.append(("parameters", f"{before:,}", f"{after:,}", f"{after / before:.0%}"))
    if bound:
        rows.append(("budget", "", "", bound))
    return "\n".join(aligned_lines(rows))


def _plans(
    model: PreTrainedModel,
    num_layers: int | Sequence[int] | None,
    importance: Importance,
    batch: Mapping[str, Any] | None,
    optional: bool,
) -> list[Cut]:
    """Return the cuts that are tried, the largest first; `optional`: where there are none, channels go alone."""
    if importance not in get_args(Importance):
        raise ConfigurationError(
            "There is no such importance",
            received=f"importance={importance!r}",
            expected=f"one of {', '.join(map(repr, get_args(Importance)))}",
            todo="choose one of these",
        )
    depths = find_depths(model)
    if not depths and optional and num_layers is None:
        return [Cut({})]
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
