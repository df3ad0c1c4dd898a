"""The numbers that loss terms are averages over, exact over micro-batches and processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..features.precision import at_least_float32
from ..models.tasks import IGNORED, Task, batch_size, token_targets


@dataclass
class StepCounts:
    """The counts of one optimizer step: of each micro-batch here, and in total over all processes.

    Counts stay tensors on the batches' device: reading one would make the host wait for the device in every step.

    Attributes:
        task_items: Items of the task loss in each micro-batch to come, scalars.
        totals: (3) task items, logit items and samples over the whole window and all processes.
        processes: Number of processes; Trainer averages gradients over them, which multiplies back.
    """

    task_items: deque[Tensor] = field(default_factory=deque)
    totals: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    processes: int = 1

    def task_scale(self, items: Tensor) -> Tensor:
        """Return the factor that turns a micro-batch mean over `items` into its share of the window's mean."""
        return items / self.totals[0].clamp(min=1) * self.processes

    def logit_scale(self) -> Tensor:
        """Return the factor that turns a sum over logit items into its share of the window's mean."""
        return self.processes / self.totals[1].clamp(min=1)

    def sample_scale(self) -> Tensor:
        """Return the factor that turns a sum over samples into its share of the window's mean."""
        return self.processes / self.totals[2].clamp(min=1)


def scaled(loss: Tensor, scale: Tensor) -> Tensor:
    """Return loss * scale in the loss's precision; half precision is rounded once, after the product."""
    wide = at_least_float32(loss)
    return (wide * scale.to(wide.dtype)).to(loss.dtype)


def count_items(batch: Mapping[str, Any], task: Task, shifted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Count what the terms of a micro-batch are averages over, without waiting for the device.

    Args:
        batch: The micro-batch.
        task: The kind of head.
        shifted: Whether position n predicts label n + 1 (causal language models).

    Returns:
        Task items, logit items, samples: scalars on the batch's device, in its widest precision. Items are samples,
        or for token tasks the labels that are not -100; logit items without labels are the tokens that are not
        padding.
    """
    kind = _widest(batch)
    samples = torch.full((), float(batch_size(batch)), **kind)
    labels = batch.get("labels")
    if task == "tokens":
        mask = token_targets(labels, batch.get("attention_mask"), shifted)
        count = samples if mask is None else mask.sum().to(**kind)
        return (count, count, samples) if _countable(labels) else (samples, count, samples)
    if _countable(labels):
        return (labels != IGNORED).sum().to(**kind), samples, samples  # type: ignore[union-attr]
    return samples, samples, samples


def count_step(batches: list[Any], task: Task, shifted: bool, reduce_sum: Callable[[Tensor], Tensor]) -> StepCounts:
    """Count the items of all micro-batches of an optimizer step, here and over all processes.

    Args:
        batches: The micro-batches of this process.
        task: The kind of head.
        shifted: Whether position n predicts label n + 1.
        reduce_sum: Adds a tensor over processes; called once.
    """
    counts = torch.stack([torch.stack(count_items(batch, task, shifted)) for batch in batches])
    return StepCounts(deque(counts[:, 0].unbind()), reduce_sum(counts.sum(0)))


def safe_labels(labels: Any, items: Tensor) -> Any:
    """Return labels whose mean loss is finite: where a micro-batch counts no item, class 0 in place of every -100.

    The mean over nothing would be NaN, and so would its gradient. The term is multiplied by the number of items, so
    what stands in adds nothing, and no process has to know of it: each reaches every parameter and logs every term.

    Args:
        labels: The batch's labels, or anything else, which is returned as it is.
        items: What `count_items` counted, a scalar.
    """
    if not _countable(labels):
        return labels
    return torch.where((items > 0).to(labels.device, non_blocking=True), labels, torch.zeros_like(labels))


def _widest(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the device of a batch and the widest precision there, in which sums of counts are exact."""
    device = next((value.device for value in batch.values() if isinstance(value, Tensor)), torch.device("cpu"))
    labels = batch.get("labels")
    device = labels.device if isinstance(labels, Tensor) else device
    return {"device": device, "dtype": torch.float32 if device.type == "mps" else torch.float64}


def _countable(labels: Any) -> bool:
    return isinstance(labels, Tensor) and not labels.is_floating_point() and not labels.is_complex()
