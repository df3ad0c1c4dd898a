"""The largest student within a budget of parameters and of time: fewer blocks first, then fewer channels."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..data.views import preserved_random_state
from ..errors import ConfigurationError, InputError
from .cutting import Cut, cut_config, new_model
from .inputs import evaluating
from .latency import forward_call, interleaved_times
from .sizes import count_parameters, empty_like
from .width import WidthPlanner

# For which a student is measured, and 15 times at least.
SECONDS = 0.2
# Channels go before there are fewer blocks than this share of the teacher's.
FLOOR = 1 / 3
# A latency that is advised is some times the measured one, which varies.
MARGIN = 1.5


@dataclass(frozen=True)
class Size:
    """The size of a student: its blocks, and the channels of its last stage (None: the teacher's)."""

    cut: Cut
    width: int | None = None


@dataclass(frozen=True)
class Budget:
    """The largest share of the teacher's parameters, and the longest forward pass in ms; None is no limit."""

    parameters: float | None
    latency_ms: float | None
    batch: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        if self.parameters is not None and not 0 < self.parameters <= 1:
            raise ConfigurationError(
                "A share of the teacher's parameters is between 0 and 1",
                received=f"parameters={self.parameters}",
                expected="a number in (0, 1]",
                todo="set parameters=0.5 for half of them, for example",
            )
        if self.latency_ms is not None and not self.latency_ms > 0:
            raise ConfigurationError(
                "A latency is a time",
                received=f"latency_ms={self.latency_ms}",
                expected="milliseconds, more than 0",
                todo="set latency_ms to the longest forward pass that you allow",
            )
        if self.latency_ms is not None and self.batch is None:
            raise ConfigurationError(
                "A latency is measured on a batch, and there is none",
                received=f"latency_ms={self.latency_ms}, batch=None",
                expected="inputs of the size that the student will get",
                todo="pass batch=..., such as a tokenizer's output for one text",
            )

    def __bool__(self) -> bool:
        return self.parameters is not None or self.latency_ms is not None


class SizeSearch:
    """Chooses among the sizes of students: `plans` of blocks, the most first, and channels, or `width` alone."""

    def __init__(self, model: PreTrainedModel, plans: Sequence[Cut], width: int | None, budget: Budget):
        self._model, self._budget = model, budget
        blocks = [sum(map(len, plan.kept.values())) for plan in plans]
        above = sum(count >= math.ceil(blocks[0] * FLOOR) for count in blocks)
        self._high, self._low, self._width = plans[:above], plans[above:], width
        self._counts: dict[Size, float] = {}
        self._times: dict[Size, float] = {}

    def choose(self) -> tuple[Size, str]:
        """Return the largest size within the budget, and which limit it met; `ConfigurationError` if there is none."""
        tried: list[Size] = []
        for step in (self._fewer_blocks, self._fewer_channels, self._fewer_of_both):
            sizes = step()
            tried += sizes
            small = [size for size in sizes if self._is_small(size)]
            found = self._first_fast(small, in_order=step != self._fewer_of_both)
            if found is not None:
                before = tried.index(found) - 1
                bound = "latency_ms" if before >= 0 and self._is_small(tried[before]) else "parameters"
                return found, "met without a cut" if before < 0 else f"{bound}={getattr(self._budget, bound)}"
        raise self._impossible(tried)

    @cached_property
    def _planner(self) -> WidthPlanner:
        return WidthPlanner(self._model, self._budget.batch)

    @property
    def whole_width(self) -> int:
        """The teacher's channels, of its last stage."""
        return self._planner.channels.width

    def _fewer_blocks(self) -> list[Size]:
        return [Size(plan, self._width) for plan in self._high]

    def _fewer_channels(self) -> list[Size]:
        return [Size(self._high[-1], width) for width in self._widths]

    def _fewer_of_both(self) -> list[Size]:
        sizes = [Size(plan, width) for plan in self._low for width in (self._width, *self._widths)]
        return sorted(sizes, key=self._count, reverse=True)

    @cached_property
    def _widths(self) -> list[int]:
        """Return the numbers of channels that are possible; none where they are given, or the family has no others."""
        if self._width is not None:
            return []
        try:
            return self._planner.widths()
        except InputError:
            return []

    def config(self, size: Size) -> Any:
        """Return the configuration of a student of that size."""
        config = self._model.config
        if size.width is not None:
            config = self._planner.channels.narrower(config, size.width)
        return cut_config(config, size.cut)

    def _count(self, size: Size) -> float:
        if size not in self._counts:
            made = empty_like(self._model, self.config(size))
            # A family may need some block, such as one with attention.
            self._counts[size] = math.inf if made is None else count_parameters(made)
        return self._counts[size]

    def _is_small(self, size: Size) -> bool:
        limit = self._budget.parameters or 1
        return self._count(size) <= limit * count_parameters(self._model)

    def _first_fast(self, sizes: list[Size], in_order: bool) -> Size | None:
        """Return the first size that is fast enough; `in_order`: time falls, so half of them is left each time."""
        if not sizes or self._budget.latency_ms is None:
            return sizes[0] if sizes else None
        if not in_order:
            return next(filter(self._is_fast, sizes), None)
        first, last = 0, len(sizes) - 1
        while first < last:
            middle = (first + last) // 2
            first, last = (first, middle) if self._is_fast(sizes[middle]) else (middle + 1, last)
        return sizes[first] if self._is_fast(sizes[first]) else None

    def _is_fast(self, size: Size) -> bool:
        if size not in self._times:
            with preserved_random_state(0):
                student = new_model(self._model, self.config(size))
            self._times[size] = measure_latency(student, self._budget.batch or {})
        return self._times[size] <= (self._budget.latency_ms or math.inf)

    def _impossible(self, tried: list[Size]) -> ConfigurationError:
        small = [size for size in tried if self._is_small(size)]
        if not small:
            # Rounded up, so that the advice can be followed.
            least = math.ceil(100 * min(map(self._count, tried)) / count_parameters(self._model)) / 100
            return ConfigurationError(
                "No student of this family is as small",
                received=f"parameters={self._budget.parameters}",
                expected=f"a share of {least:.2f} at least, which the smallest student has",
                todo=f"set parameters={least:.2f}, or leave hidden_size and num_layers to the budget",
            )
        self._is_fast(small[-1])
        least = min(self._times.values())
        return ConfigurationError(
            "No student of this family is as fast on this machine",
            received=f"latency_ms={self._budget.latency_ms}",
            expected=f"{least:.3g} ms at least, which the fastest student takes for this batch",
            todo=f"set latency_ms={MARGIN * least:.3g}, or leave hidden_size and num_layers to the budget",
        )


def measure_latency(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """Return the median time of a forward pass in milliseconds, without labels."""
    with evaluating(model):
        return statistics.median(interleaved_times({"": forward_call(model, batch)}, SECONDS)[""])
