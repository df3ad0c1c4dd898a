"""Nothing broken is learned, logged or saved: NaN and infinite losses end the training."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteLossError
from .plan import Services


@dataclass
class PendingLoss:
    """A loss and its named terms on their way from the device, with the batch to find out whose fault they are.

    `arrived` tells when the values can be read; None when reading waits by itself.
    """

    step: int
    values: Tensor
    names: tuple[str, ...]
    batch: Mapping[str, Any]
    arrived: torch.cuda.Event | None = None

    def read(self) -> list[float]:
        """Return the values, waiting for them where they have not arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


class FiniteGuard:
    """Checks every loss, on an accelerator one step late, so that the host never waits for the device.

    Attributes:
        check_teacher: Raises where the teacher's outputs for a batch are not finite.
        deferred: Whether a loss is checked late, but before anything is logged or saved: everywhere but on the CPU.
        pending: The loss that was not checked yet.
    """

    def __init__(self, services: Services, check_teacher: Callable[[Mapping[str, Any]], None]):
        self.services = services
        self.check_teacher = check_teacher
        self.deferred = services.device.type != "cpu"
        self.pending: PendingLoss | None = None

    def check(self, loss: Tensor, terms: Mapping[str, Tensor], batch: Mapping[str, Any], step: int) -> None:
        """Raise where a loss, or the one before, is not finite: `TeacherOutputError` when the teacher is to blame."""
        values = torch.stack([loss.detach(), *(value.detach().to(loss.dtype) for value in terms.values())])
        seen = PendingLoss(step, values, tuple(terms), batch)
        if not self.deferred:
            self._refuse_broken(seen)
            return
        if values.is_cuda:
            # From CUDA, such a copy goes to pinned memory, and the host goes on.
            seen.values, seen.arrived = values.to("cpu", non_blocking=True), torch.cuda.Event()
            seen.arrived.record()
        # The one before has arrived while this one was computed.
        before, self.pending = self.pending, seen
        if before is not None:
            self._refuse_broken(before)

    def check_pending(self, step: int) -> None:
        """Check the last loss on all processes at once: gradients are shared, and so is what breaks them."""
        if not self.deferred:
            return
        pending, self.pending = self.pending, None
        finite = torch.tensor(float(pending is None or math.isfinite(pending.read()[0])))
        everywhere = float(self.services.reduce_sum(finite)) == self.services.processes
        if pending is not None:
            self._refuse_broken(pending)
        if not everywhere:
            raise NonFiniteLossError(
                f"The loss of another process is not finite in step {step}",
                received="NaN or infinity there, and with it in the gradient here",
                expected="finite loss terms",
                todo="see the error of that process",
            )

    def _refuse_broken(self, seen: PendingLoss) -> None:
        loss, *values = seen.read()
        if math.isfinite(loss):
            return
        # Its outputs were not kept: that would hold the features for a whole step. A frozen teacher gives them again.
        self.check_teacher(seen.batch)
        named = zip(seen.names, values, strict=True)
        broken = [f"{name} = {value:g}" for name, value in named if not math.isfinite(value)]
        state = "weights in memory broken and the checkpoints intact" if self.deferred else "weights untouched"
        raise NonFiniteLossError(
            f"The loss is not finite in step {seen.step}; training stops with the {state}",
            received=", ".join(broken) or "a sum of finite terms that overflows",
            expected="finite loss terms",
            todo="lower the learning rate, clip gradients (max_grad_norm), use bf16 instead of fp16, and "
            "go on from the last checkpoint with train(resume_from_checkpoint=True)",
        )
