"""What the parts of a training may ask of the engine that runs it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor


@dataclass(frozen=True)
class Services:
    """A few functions of the engine, in place of the engine itself.

    Attributes:
        device: Where the student is trained.
        processes: Number of processes; gradients are averaged over them.
        is_main: Whether this is the process that logs and saves.
        mixed_precision: `no`, `bf16` or `fp16`.
        autocast: Returns the context in which the student's forward runs.
        reduce_sum: Adds a tensor over processes; it stays on its device.
    """

    device: torch.device
    processes: int
    is_main: bool
    mixed_precision: str
    autocast: Callable[[], AbstractContextManager[None]]
    reduce_sum: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, accelerator: Accelerator, device: torch.device) -> Services:
        """Return the services of an accelerator whose training runs on a device."""
        processes = accelerator.num_processes

        def reduce_sum(tensor: Tensor) -> Tensor:
            if processes == 1:
                return tensor
            return accelerator.reduce(tensor.to(device), reduction="sum").to(tensor.device)

        main, precision = accelerator.is_main_process, accelerator.mixed_precision
        return cls(device, processes, main, precision, accelerator.autocast, reduce_sum)
