"""Which blocks of a model are kept: evenly spaced ones, or those that matter most on a calibration batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError, InputError
from .cutting import Cut, cut_blocks
from .inputs import evaluating, inference_inputs, on_device, run_on_inputs
from .outputs import first_tensor
from .sizes import Depth

Importance = Literal["even", "change", "loss"]


def even_blocks(count: int, kept: int) -> tuple[int, ...]:
    """Return the numbers of blocks that are kept of `count`, evenly spaced from the first to the last."""
    if kept == 1:
        return (0,)
    return tuple(round(place * (count - 1) / (kept - 1)) for place in range(kept))


def block_order(
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
    measure = {"change": block_changes, "loss": block_losses}[importance]
    return {depth: partial(_largest, measure(model, depth, batch)) for depth in depths}


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

    with evaluating(model), ExitStack() as hooks:
        for block in range(depth.size.value):
            module = model.get_submodule(f"{depth.lists[0]}.{block}")
            hooks.enter_context(module.register_forward_hook(partial(note, block), with_kwargs=True))
        model(**inference_inputs(model, batch))
    if len(found) < depth.size.value or len(depth.lists) > 1:
        raise _unmeasured(model, f"{len(found)} of {depth.size.value} blocks that change what they are given")
    return [found[block] for block in range(depth.size.value)]


def _unmeasured(model: nn.Module, received: str) -> InputError:
    return InputError(
        f"The importance of the blocks of {type(model).__name__} cannot be measured",
        received=received,
        expected="blocks that take hidden states and return hidden states of the same size",
        todo="leave importance at 'even'",
    )


@torch.no_grad()
def block_losses(model: PreTrainedModel, depth: Depth, batch: Mapping[str, Any]) -> list[float]:
    """Return the loss on a batch with labels without each block, the others being as they are.

    It is infinite for a block that cannot be removed, such as the first of a stage.
    """
    losses, inputs = [], on_device(model, batch)
    with evaluating(model):
        whole = run_on_inputs("teacher", inputs, lambda: model(**inputs))
    if getattr(whole, "loss", None) is None:
        raise InputError(
            f"The importance of the blocks of {type(model).__name__} cannot be measured: it returns no loss",
            received=f"a batch of {', '.join(map(str, batch))}",
            expected="a calibration batch with the labels of the task",
            todo="add labels to the batch, or set importance to 'change' or 'even'",
        )
    for block in range(depth.size.value):
        others = tuple(other for other in range(depth.size.value) if other != block)
        try:
            losses.append(float(cut_blocks(model, Cut({depth: others})).eval()(**inputs).loss))
        except Exception:  # a model without the only block of a kind fails in ways of its own
            losses.append(float("inf"))
    if min(losses) == float("inf"):
        raise _unmeasured(model, "no block that can be removed by itself")
    return losses
