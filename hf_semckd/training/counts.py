"""The numbers that loss terms are averaged over, exact over micro-batches and processes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..features.precision import at_least_float32
from ..models.outputs import batch_size, device_of, token_targets
from ..models.own_loss import DEFAULT_LOSS, OwnLoss, count_ends, has_ends
from ..models.packing import document_count, document_starts
from ..models.tasks import Task

# The entry of a training batch that holds its counts.
COUNTS = "distillation_counts"
Reduction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StepCounts:
    """The counts of one micro-batch, and of the optimizer step that it belongs to.

    Trainer averages gradients over processes and adds them over micro-batches. Every term is therefore a sum over
    items, divided by the number of items in the whole step on all processes, times the number of processes.

    Counts stay tensors on the batch's device: reading one would make the host wait for the device in every step.

    Attributes:
        items, samples: Items of the task loss in the micro-batch, and its samples; scalars.
        totals: (3) task items, logit items and samples over the whole step and all processes.
        stops: How many processes were asked to stop; a scalar.
        ends: (2) answers of the whole step that start, and that end, inside their texts; None for other tasks.
    """

    items: Tensor
    samples: Tensor
    totals: Tensor
    processes: int = 1
    stops: Tensor | None = None
    ends: Tensor | None = None

    def task_scale(self) -> Tensor:
        """Return the factor that turns the micro-batch's mean into its share of the step's mean."""
        return self.items / self.totals[0].clamp(min=1) * self.processes

    def task_sum_scale(self) -> Tensor:
        """Return the factor that turns a sum over task items into its share of the step's mean."""
        return self.processes / self.totals[0].clamp(min=1)

    def logit_scale(self) -> Tensor:
        """Return the factor that turns a sum over logit items into its share of the step's mean."""
        return self.processes / self.totals[1].clamp(min=1)

    def sample_scale(self) -> Tensor:
        """Return the factor that turns the micro-batch's mean over samples into its share of the step's mean."""
        return self.samples / self.totals[2].clamp(min=1) * self.processes


def count_step(
    batches: Sequence[Mapping[str, Any]],
    task: Task,
    shifted: bool,
    reduce_sum: Reduction,
    processes: int = 1,
    asked_to_stop: bool = False,
    own_loss: OwnLoss = DEFAULT_LOSS,
) -> list[StepCounts]:
    """Count the items of all micro-batches of an optimizer step, here and over all processes; see `count_items`.

    Whether this process was asked to stop travels in the same reduction.
    """
    counts = torch.stack([torch.stack(count_items(batch, task, shifted, own_loss)) for batch in batches])
    sums = counts.sum(0)
    ends = [torch.stack([count_ends(batch) for batch in batches]).sum(0).to(sums)] if own_loss.finds_ends else []
    sums = reduce_sum(torch.cat([sums, sums.new_full((1,), float(asked_to_stop)), *ends]))
    totals, stops, found = sums[:3], sums[3], sums[4:] if ends else None
    return [StepCounts(own[0], own[2], totals, processes, stops, found) for own in counts.unbind()]


def scaled(loss: Tensor, scale: Tensor) -> Tensor:
    """Return loss * scale in the loss's precision; half precision is rounded once, after the product."""
    wide = at_least_float32(loss)
    return (wide * scale.to(wide.dtype)).to(loss.dtype)


def count_items(
    batch: Mapping[str, Any], task: Task, shifted: bool, own_loss: OwnLoss = DEFAULT_LOSS
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the task items, logit items and samples of a micro-batch, scalars on its device that nobody waits for.

    Items are the labels that count in the student's own loss: those that are not -100, or another number for pixels
    (see `OwnLoss`); without labels they are samples. Logit items are samples, or the labeled tokens; without labels
    the tokens that are not padding. `shifted` tells that position n predicts label n + 1 (causal language models).
    """
    labels = batch.get("labels")
    device = device_of((labels, *batch.values())) or torch.device("cpu")
    # Sums of counts are exact in the widest precision of the device.
    kind: dict[str, Any] = {"device": device, "dtype": torch.float32 if device.type == "mps" else torch.float64}
    # The samples of packed rows are their documents.
    starts, documents = document_starts(batch), document_count(batch)
    samples = torch.full((), float(batch_size(batch)), **kind) if documents is None else documents.to(**kind)
    if own_loss.finds_ends and has_ends(batch):
        return count_ends(batch).sum().to(**kind), samples, samples
    if task == "frames":
        return samples, samples, samples
    if task == "tokens":
        mask = token_targets(labels, batch.get("attention_mask"), shifted, starts)
        count = samples if mask is None else mask.sum().to(**kind)
        return (count, count, samples) if _countable(labels) else (samples, count, samples)
    if _countable(labels):
        counted = torch.ones_like(labels, dtype=torch.bool)
        for ignored in own_loss.ignored:
            counted &= labels != ignored
        return counted.sum().to(**kind), samples, samples
    return samples, samples, samples


def safe_labels(labels: Any, items: Tensor) -> Any:
    """Return labels whose mean loss is finite: where a micro-batch counts no item, class 0 in place of every one.

    The mean over nothing would be NaN, and so would its gradient. The term is multiplied by the number of items, so
    what stands in adds nothing, and no process has to know of it: each reaches every parameter and logs every term.
    Labels that cannot be counted, or are none, come back as they are.
    """
    if not _countable(labels):
        return labels
    return torch.where((items > 0).to(labels.device, non_blocking=True), labels, torch.zeros_like(labels))


def _countable(labels: Any) -> TypeGuard[Tensor]:
    return isinstance(labels, Tensor) and not labels.is_floating_point() and not labels.is_complex()
