"""Times of function calls that can be compared: warmed up, in turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .inputs import inference_inputs, input_device

# Of each turn the first call is not counted: another model has just used the caches.
CALLS_A_TURN = 5
FEWEST_TURNS = 3


def forward_call(model: nn.Module, batch: Mapping[str, Any]) -> Callable[[], object]:
    """Return a function that runs a model on what it takes of a batch, and waits for the GPU."""
    inputs, device = inference_inputs(model, batch), input_device(model)

    @torch.inference_mode()
    def call() -> object:
        outputs = model(**inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return outputs

    return call


def interleaved_times(calls: Mapping[str, Callable[[], object]], seconds: float = 1.0) -> dict[str, list[float]]:
    """Return the times of calls in milliseconds: as many of each, 15 at least, and those of the slowest for `seconds`.

    A turn of a call is six in a row, then it is the next one's. A call must return when its work is done: on a GPU it
    has to synchronize.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    turns = 0
    while turns < FEWEST_TURNS or max(map(sum, times.values())) < 1000 * seconds:
        for name, call in calls.items():
            call()
            for _ in range(CALLS_A_TURN):
                started = time.perf_counter()
                call()
                times[name].append(1000 * (time.perf_counter() - started))
        turns += 1
    return times
