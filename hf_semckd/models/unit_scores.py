"""The importance of channels, heads and inner units: by what they contribute to a calibration batch, or by weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import evaluating
from .units import Labels

Scores = dict[str, Tensor]


def unit_scores(model: nn.Module, labels: Labels, inputs: Mapping[str, Any] | None) -> Scores:
    """Return the importance of each unit of each group.

    With `inputs`: for each layer that reads a group, the mean square of what it reads of a unit times the squares of
    the weights along it, as a share of the layer's sum. Without, and for a group that no linear layer or convolution
    reads: the share of the squares of all weights along it.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), 2023.
    """
    state = model.state_dict()
    squares = {place: _squares(state[place[0]], place[1]) for place in labels}
    by_weight = _summed(labels, squares)
    if inputs is None:
        return by_weight
    seen = _input_squares(model, labels, inputs)
    return by_weight | _summed(labels, {place: squares[place] * value for place, value in seen.items()})


def _squares(value: Tensor, axis: int) -> Tensor:
    """Return the sum of squares at every place of an axis."""
    squares = value.detach().float().square().movedim(axis, 0)
    return squares.reshape(len(squares), -1).sum(1).cpu()


def _summed(labels: Labels, values: Mapping[tuple[str, int], Tensor]) -> Scores:
    """Return the values at every place of axes, summed by unit, as shares of each axis, summed by group."""
    scores: Scores = {}
    for place, value in values.items():
        units = labels[place]
        each = units.sums(value)
        share = each / each.sum().clamp(min=1e-12)
        scores[units.group] = scores[units.group] + share if units.group in scores else share
    return scores


@torch.no_grad()
def _input_squares(model: nn.Module, labels: Labels, inputs: Mapping[str, Any]) -> dict[tuple[str, int], Tensor]:
    """Return the mean square of every entry that layers read along labeled axes; padding does not count."""
    sums: dict[tuple[str, int], Tensor] = {}
    mask = inputs.get("attention_mask")

    def note(place: tuple[str, int], dim: int, _module: nn.Module, args: Any) -> None:
        if not args:
            return
        read = args[0].detach().float().movedim(dim, -1)
        if isinstance(mask, Tensor) and mask.dim() == 2 and read.shape[:-1] == mask.shape:
            read = read[mask.bool()]
        read = read.reshape(-1, read.shape[-1])
        square = read.square().sum(0).cpu() / max(len(read), 1)  # an expert may get no token
        sums[place] = sums[place] + square if place in sums else square

    with evaluating(model), ExitStack() as hooks:
        for name, module in model.named_modules():
            turned, convolves = type(module).__name__ == "Conv1D", isinstance(module, (nn.Conv1d, nn.Conv2d))
            place = (f"{name}.weight", 0 if turned else 1)
            reads = turned or isinstance(module, nn.Linear) or (convolves and module.groups == 1)
            if reads and place in labels:
                hooks.enter_context(module.register_forward_pre_hook(partial(note, place, 1 if convolves else -1)))
        model(**inputs)
    return sums
