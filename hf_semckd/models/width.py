"""Narrowing a model: fewer channels, attention heads and inner units; what contributes least goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.views import preserved_random_state
from ..errors import InputError
from .channels import QUERY, Channels, cannot_narrow, find_channels
from .cutting import new_model
from .inputs import inference_inputs
from .proof import OrderProof, example_inputs
from .sizes import empty_like, find_depths, shapes_of
from .unit_scores import unit_scores
from .units import Labels, group_counts, group_sizes, groups_of, kept_counts, read_axes


@dataclass(frozen=True)
class WidthPlan:
    """A narrower configuration, what the axes run along that are shorter then, and how many units of each are kept."""

    config: Any
    labels: Labels
    counts: Mapping[str, int]


class WidthPlanner:
    """Finds how a model can be narrowed; `InputError` for a family whose axes are not known.

    `batch` are inputs on which this is proved; without it, some are made up.
    """

    def __init__(self, model: PreTrainedModel, batch: Mapping[str, Any] | None = None):
        self._model = model
        self.channels: Channels = find_channels(model, group_sizes(model))
        self.inputs = example_inputs(model) if batch is None else inference_inputs(model, batch)
        self._blocks = tuple(name for depth in find_depths(model) for name in depth.lists)

    @cached_property
    def _proof(self) -> OrderProof:
        return OrderProof(self._model, self.inputs)

    def plan(self, width: int) -> WidthPlan:
        """Return how the last stage gets that many channels; `ConfigurationError` where heads do not divide them."""
        model = self._model
        config = self.channels.narrower(model.config, width)
        made = empty_like(model, config)
        own = {} if made is None else shapes_of(made)
        if made is None or own.keys() != shapes_of(model).keys():
            raise cannot_narrow(model, f"its configuration refuses {width} channels")
        if any(groups_of(made.get_submodule(name)) != count for name, count in group_counts(model).items()):
            raise cannot_narrow(model, "its groups of channels change their number")
        for labels in read_axes(model, self.channels, own, self._blocks):
            counts = kept_counts(labels, own)
            if counts is not None and self._proof(labels):
                return WidthPlan(config, labels, counts)
        raise cannot_narrow(model, "its outputs depend on the order of channels, heads or inner units")

    def widths(self) -> list[int]:
        """Return smaller numbers of channels that are possible, the largest first: near every eighth of all."""
        whole, step = self.channels.width, self.channels.step
        near = {max(1, round(whole * part / 8 / step)) * step for part in range(1, 8)}
        return [width for width in sorted(near, reverse=True) if width < whole and self._works(width)]

    def _works(self, width: int) -> bool:
        try:
            with torch.no_grad(), preserved_random_state(0):
                new_model(self._model, self.plan(width).config).eval()(**self.inputs)
        except (InputError, RuntimeError):  # a kernel may need a multiple of some number
            return False
        return True


def narrow(model: PreTrainedModel, hidden_size: int, batch: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Return a new model of the same class with fewer channels; the given one stays as it is.

    `hidden_size` is the number of channels of the last stage; other stages keep their ratio to it, and so do inner
    units, while heads keep their width. Raises `ConfigurationError` for a number that the heads do not divide,
    `InputError` for a family whose axes are not known.
    """
    planner = WidthPlanner(model, batch)
    plan = planner.plan(hidden_size)
    scores = unit_scores(model, plan.labels, batch if batch is None else planner.inputs)
    kept = {
        group: scores[group].argsort(descending=True, stable=True)[:count].sort().values
        for group, count in plan.counts.items()
    }
    with preserved_random_state(0):
        student = new_model(model, plan.config)
    student.load_state_dict(_sliced(model.state_dict(), plan.labels, kept))
    try:
        with torch.no_grad():
            student.eval()(**planner.inputs)
    except RuntimeError as error:
        raise cannot_narrow(model, "some part of it keeps the number of channels") from error
    return student.train(model.training)


def _sliced(state: Mapping[str, Tensor], labels: Labels, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights along the units that are kept."""
    sliced = dict(state)
    for (name, axis), units in labels.items():
        before = sliced[name].shape[axis]
        value = sliced[name].index_select(axis, units.places(kept[units.group]).to(sliced[name].device))
        if units.group.startswith("entries") and axis == 0 and _is_query(name):
            # Scores are divided by the square root of a head's width, which falls.
            value = value * (value.shape[axis] / before) ** 0.5
        sliced[name] = value
    return sliced


def _is_query(name: str) -> bool:
    return any(QUERY.search(part) and "q" in part and "k" not in part for part in name.split(".")[-2:])
