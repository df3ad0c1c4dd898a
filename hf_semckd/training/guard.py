"""Nothing broken is learned, logged or saved: NaN and infinite losses end the training."""

import itertools
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import NonFiniteLossError
from .arriving import Arriving
from .plan import Services


@dataclass
class PendingLoss:
    """A loss and its named terms on their way from the device, with the batch to find out whose fault they are."""

    step: int
    values: Arriving
    names: tuple[str, ...]
    batch: Mapping[str, Any]


class FiniteGuard:
    """Checks every loss, on an accelerator one step late, so that the host never waits for the device.

    Attributes:
        check_teacher: Raises where the teacher's outputs for a batch are not finite.
        student: Of it the message tells which weights and buffers are broken.
        infinite: The student's buffers that were not finite from the start, such as masks of -inf.
        deferred: Whether a loss is checked late, but before anything is logged or saved: everywhere but on the CPU.
        pending: The loss that was not checked yet.
    """

    def __init__(self, services: Services, check_teacher: Callable[[Mapping[str, Any]], None], student: nn.Module):
        self.services = services
        self.check_teacher = check_teacher
        self.student = student
        self.infinite = infinite_buffers(student)
        self.deferred = services.device.type != "cpu"
        self.pending: PendingLoss | None = None

    def check(self, loss: Tensor, terms: Mapping[str, Tensor], batch: Mapping[str, Any], step: int) -> None:
        """Raise where a loss, or the one before, is not finite: `TeacherOutputError` when the teacher is to blame."""
        values = torch.stack([loss.detach(), *(value.detach().to(loss.dtype) for value in terms.values())])
        seen = PendingLoss(step, Arriving.of(values), tuple(terms), batch)
        if not self.deferred:
            self._refuse_broken(seen)
            return
        # The one before has arrived while this one was computed.
        before, self.pending = self.pending, seen
        if before is not None:
            self._refuse_broken(before)

    def check_pending(self, step: int) -> None:
        """Check the last loss on all processes at once: gradients are shared, and so is what breaks them."""
        if not self.deferred:
            return
        pending, self.pending = self.pending, None
        finite = torch.tensor(float(pending is None or math.isfinite(pending.values.read()[0])))
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
        loss, *values = seen.values.read()
        if math.isfinite(loss):
            return
        # Its outputs were not kept: that would hold the features for a whole step. A frozen teacher gives them again.
        self.check_teacher(seen.batch)
        named = zip(seen.names, values, strict=True)
        broken = [f"{name} = {value:g}" for name, value in named if not math.isfinite(value)]
        # Weights may have been broken before; BatchNorm's buffers have seen the batch.
        state = non_finite(self.student, self.infinite)
        told = "the weights untouched" if state is None else f"the student's {state} not finite"
        raise NonFiniteLossError(
            f"The loss is not finite in step {seen.step}; training stops with {told}, and the checkpoints intact",
            received=", ".join(broken) or "a sum of finite terms that overflows",
            expected="finite loss terms",
            todo="lower the learning rate, clip gradients (max_grad_norm), use bf16 instead of fp16, and "
            "go on from the last checkpoint with train(resume_from_checkpoint=True)",
        )


def in_any_process(found: bool, accelerator: Accelerator) -> bool:
    """Whether something was found in any process: all of them ask, and get the same answer."""
    return bool(accelerator.reduce(torch.tensor(float(found), device=accelerator.device), reduction="sum"))


def non_finite(student: nn.Module, but: Container[str] = ()) -> str | None:
    """Name the first three weights and buffers, `but` some, that hold NaN or infinity; None where all are finite."""
    broken = []
    for name, tensor in itertools.chain(student.named_parameters(), student.named_buffers()):
        # Of a sharded one the part that is here: to look at all would need the other processes.
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if name not in but and local.is_floating_point() and not bool(local.detach().isfinite().all()):
            broken.append(name)
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    return f"{', '.join(broken[:3])}{more}" if broken else None


def infinite_buffers(student: nn.Module) -> frozenset[str]:
    """Return the names of buffers that hold infinity, and no NaN, as masks do."""
    numbers = {name: entry for name, entry in student.named_buffers() if entry.is_floating_point()}
    return frozenset(
        name
        for name, entry in numbers.items()
        if not entry.is_meta and bool(entry.isinf().any()) and not bool(entry.isnan().any())
    )


def refuse_non_finite(
    student: nn.Module,
    step: int,
    accelerator: Accelerator | None = None,
    *,
    buffers: bool = True,
    but: Iterable[str] = (),
) -> None:
    """Raise `NonFiniteLossError` where weights or buffers hold NaN or infinity: such a student is not saved.

    Args:
        accelerator: Given where all processes come here: they raise alike then.
        buffers: Whether this process's are saved, so far as a module saves them at all.
        but: What was not finite before the training.
    """
    broken = non_finite(student, {*_unsaved_buffers(student, buffers), *but})
    found = broken is not None
    if not (found if accelerator is None else in_any_process(found, accelerator)):
        return
    raise NonFiniteLossError(
        f"The student is not finite after step {step}; it is not saved, and what was saved before is intact",
        received=f"NaN or infinity in {broken or 'the student of another process'}",
        expected="finite weights and buffers",
        todo="check the inputs, lower the learning rate, and train anew, or from the last checkpoint with "
        "train(resume_from_checkpoint=True)",
    )


def _unsaved_buffers(student: nn.Module, saves: bool) -> Iterator[str]:
    for place, module in student.named_modules():
        for name, _ in module.named_buffers(recurse=False):
            # Masks of -inf are such.
            if not saves or name in module._non_persistent_buffers_set:
                yield f"{place}.{name}" if place else name
