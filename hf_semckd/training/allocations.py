"""What a training step keeps in memory: its tensors, counted while a small step runs, at two batch sizes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Two sizes tell what grows with the batch from what does not.
SAMPLES = (2, 4)


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step takes beside weights and optimizer: `fixed + per_sample * samples` at most, and gradients.

    Attributes:
        fixed, per_sample: Of all but the gradients, where most of it is held.
        course: What is still held, as a share of the most, when so many bytes of gradients are there; from the moment
            where most is held to the end of the backward pass.
        gradients: Bytes of all gradients.
    """

    fixed: float
    per_sample: float
    course: tuple[tuple[float, int], ...]
    gradients: int

    def peak(self, samples: int, *, accumulated: bool) -> int:
        """Return the most bytes held at once; with `accumulated`, the gradients of earlier micro-batches are there."""
        most = self.fixed + self.per_sample * samples
        if accumulated:
            return round(most + self.gradients)
        return round(max(share * most + gradients for share, gradients in self.course))


class LiveBytes(TorchDispatchMode):
    """Notes how many bytes of tensors are alive after every operation, of those that were made meanwhile.

    What an operation needs for itself is not seen.
    """

    def __init__(self, known: Sequence[Tensor]):
        super().__init__()
        self.timeline: list[int] = []
        # Births of storages, by their address, while they live; those that were there before count nothing.
        self.births: dict[int, int] = {}
        self._held = [entry.untyped_storage() for entry in map(_plain, known)]
        self._sizes: dict[int, tuple[int, Any]] = {entry._cdata: (0, None) for entry in self._held}
        self._live = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it made."""
        made = func(*args, **(kwargs or {}))
        for entry in tree_leaves(made):
            if isinstance(entry, Tensor):
                self._add(entry.untyped_storage())
        self.timeline.append(self._live)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place in self._sizes or not storage.nbytes():
            return

        def free(_: object) -> None:
            self._live -= self._sizes.pop(place, (0, None))[0]
            self.births.pop(place, None)

        self._sizes[place] = (storage.nbytes(), weakref.ref(storage, free))
        self.births[place] = len(self.timeline)
        self._live += storage.nbytes()


def measure_step(loss_of: Callable[[int], Tensor], known: Sequence[Tensor], trained: Sequence[Tensor]) -> StepMemory:
    """Return what a step takes; it runs twice, and leaves no gradient.

    Args:
        loss_of: Runs the forward pass on so many samples.
        known: Tensors that are there anyway: weights, buffers and inputs.
        trained: The parameters whose gradients are taken.
    """
    small, large = (_run(loss_of, samples, known, trained) for samples in SAMPLES)
    most = [max(held) for held, _ in (small, large)]
    per_sample = max(most[1] - most[0], 0) / (SAMPLES[1] - SAMPLES[0])
    held, gradients = large
    course: list[tuple[float, int]] = []
    # From the end: a moment at which less is held than later, with fewer gradients, is never the worst.
    for amount, there in zip(reversed(held), reversed(gradients), strict=True):
        share = amount / max(most[1], 1)
        if not course or share > course[-1][0]:
            course.append((share, there))
    return StepMemory(max(most[0] - SAMPLES[0] * per_sample, 0.0), per_sample, tuple(course), gradients[-1])


def _run(
    loss_of: Callable[[int], Tensor], samples: int, known: Sequence[Tensor], trained: Sequence[Tensor]
) -> tuple[list[int], list[int]]:
    """Return the bytes held beside the gradients after every operation, and those of the gradients."""
    with LiveBytes(known) as live:
        # Not `backward`: a wrapper for several processes would wait for the others.
        found = torch.autograd.grad(loss_of(samples), list(trained), allow_unused=True)
    gradients = [0] * len(live.timeline)
    for entry in {id(entry.untyped_storage()): entry for entry in found if entry is not None}.values():
        storage = entry.untyped_storage()
        born = live.births.get(storage._cdata)
        if born is not None and born < len(gradients):
            gradients[born] += storage.nbytes()
    total, there = 0, []
    for added in gradients:
        total += added
        there.append(total)
    return [amount - done for amount, done in zip(live.timeline, there, strict=True)], there


def repeated(batch: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """Return a batch of so many samples, made of a few by taking them again."""
    made = {}
    for name, value in batch.items():
        tensor = isinstance(value, Tensor) and value.dim() > 0
        made[name] = torch.cat([value] * -(-samples // len(value)))[:samples] if tensor else value
    return made


def copied_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's buffers."""
    return {name: entry.detach().clone() for name, entry in model.named_buffers()}


@torch.no_grad()
def put_back_buffers(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Write buffers back that a forward pass has changed."""
    for name, entry in model.named_buffers():
        # One of another shape holds what was computed for longer inputs, and observed nothing.
        if name in before and before[name].shape == entry.shape:
            entry.copy_(before[name])


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes of a weight as it is here: of a sharded one its share, of a quantized one with its scales."""
    shard = getattr(tensor, "ds_tensor", None)
    if shard is None and hasattr(tensor, "to_local"):
        shard = tensor.to_local()
    if isinstance(shard, Tensor):
        return shard.numel() * shard.element_size()
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    scales = getattr(getattr(tensor, "quant_state", None), "absmax", None)
    return tensor.numel() * tensor.element_size() + (stored_bytes(scales) if isinstance(scales, Tensor) else 0)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(Tensor)
