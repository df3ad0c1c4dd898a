"""The loss terms of a batch and the numbers they are averaged over, exact over micro-batches and processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .errors import InputError, message
from .functional import at_least_float32, binary_kd_loss, kd_loss

IGNORED = -100
# Logits up to this number of elements are compared at once; more of them piece by piece.
PIECE = 2**24

Task = Literal["single_label", "multi_label", "regression", "tokens"]


@dataclass
class Window:
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


def count_window(batches: list[Any], task: Task, shifted: bool, reduce_sum: Callable[[Tensor], Tensor]) -> Window:
    """Count the items of all micro-batches of an optimizer step, here and over all processes.

    Args:
        batches: The micro-batches of this process.
        task: The kind of head.
        shifted: Whether position n predicts label n + 1.
        reduce_sum: Adds a tensor over processes; called once.
    """
    counts = torch.stack([torch.stack(count_items(batch, task, shifted)) for batch in batches])
    return Window(deque(counts[:, 0].unbind()), reduce_sum(counts.sum(0)))


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


def batch_size(batch: Mapping[str, Any]) -> int:
    """Return the number of samples in a batch: the length that most of its tensors have."""
    lengths = [len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    if lengths:
        return max(lengths, key=lengths.count)
    raise InputError(
        message(
            "The batch holds no tensor",
            received=f"columns {', '.join(map(repr, batch)) or 'none'}",
            expected="at least one tensor with a batch dimension",
            todo="check the collator and the dataset's columns",
        )
    )


def token_targets(labels: Any, attention_mask: Any, shifted: bool) -> Tensor | None:
    """Return the (B, N) positions that are predicted: labelled ones, else those that are not padding, else None.

    With `shifted`, position n stands for the prediction of token n + 1, and there are N - 1 of them.
    """
    if isinstance(labels, Tensor) and labels.dim() == 2:
        mask = labels != IGNORED
    elif isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        mask = attention_mask.bool()
    else:
        return None
    return mask[:, 1:] if shifted else mask


def task_of(logits: Tensor, labels: Any, problem_type: str | None) -> Task:
    """Tell the kind of head from its logits, labels and configuration.

    Args:
        logits: (B, classes), (B, N, classes), (B, classes, H, W) for segmentation, or (B) for one number a sample.
        labels: The batch's labels, or None.
        problem_type: `config.problem_type`.
    """
    if logits.dim() == 3:
        return "tokens"
    if problem_type == "regression" or logits.dim() == 1 or (logits.dim() == 2 and logits.shape[-1] == 1):
        return "regression"
    floating = isinstance(labels, Tensor) and labels.is_floating_point() and labels.dim() == 2
    return "multi_label" if problem_type == "multi_label_classification" or floating else "single_label"


def logit_loss_sum(
    student: Tensor, teacher: Tensor, batch: Mapping[str, Any], temperature: float, task: Task, shifted: bool
) -> Tensor:
    """Return the distillation loss of the logits, summed over the items that `count_items` counts.

    Token tasks count labelled positions only (all but padding without labels); causal language models predict the
    next token, so the last position is left out. Regression compares outputs by their squared difference.

    Args:
        student: Student logits.
        teacher: Teacher logits of the same shape.
        batch: The micro-batch, for labels and attention mask.
        temperature: T > 0.
        task: The kind of head.
        shifted: Whether position n predicts label n + 1.

    Raises:
        InputError: When the shapes differ.
    """
    if student.shape != teacher.shape:
        raise InputError(logit_shape_message(tuple(student.shape), tuple(teacher.shape)))
    if task == "regression":
        error = F.mse_loss(at_least_float32(student), at_least_float32(teacher), reduction="none")
        return error.reshape(len(error), -1).mean(1).sum()
    if task == "multi_label":
        return binary_kd_loss(student, teacher, temperature).sum()
    if task == "single_label":
        per_item = kd_loss(student.movedim(1, -1), teacher.movedim(1, -1), temperature)
        return per_item.flatten(1).mean(1).sum() if per_item.dim() > 1 else per_item.sum()
    mask = token_targets(batch.get("labels"), batch.get("attention_mask"), shifted)
    if shifted:
        student, teacher = student[:, :-1], teacher[:, :-1]
    if mask is None:
        # Items are samples then: nothing tells which tokens count.
        return kd_loss(student, teacher, temperature).mean(1).sum()
    if mask.shape != student.shape[:2]:
        # Prompt tuning puts tokens in front, for which there is neither label nor teacher.
        student, teacher = student[:, -mask.shape[1] :], teacher[:, -mask.shape[1] :]
    return _masked_divergence(student, teacher, mask, temperature)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the usual task loss for models that compute none: mean cross-entropy, or BCE / MSE for float labels."""
    if labels.is_floating_point():
        if labels.dim() == 2 and labels.shape == logits.shape and logits.shape[1] > 1:
            return F.binary_cross_entropy_with_logits(logits, labels)
        return F.mse_loss(logits.squeeze(-1), labels)
    return F.cross_entropy(at_least_float32(logits).flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def logit_shape_message(student: tuple[int, ...], teacher: tuple[int, ...]) -> str:
    """Say that two models do not predict the same classes and what to do about it."""
    return message(
        "Teacher and student logits have different shapes, so logit distillation is impossible",
        received=f"student {student}, teacher {teacher} (the last dimension is the number of labels, or the "
        "vocabulary)",
        expected="the same labels, in the same order, for both",
        todo="load the student with num_labels (and id2label) of the teacher, or set logit_weight=0 to "
        "distil features alone",
    )


def _masked_divergence(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Return the sum of the divergences at the positions of a mask (B, N).

    Selecting rows by a mask would make the host wait for their number. All positions are computed instead: small
    logits at once; large ones (a vocabulary) a few positions at a time and again in backward, so that no more is kept
    than the logits themselves, however many positions count.
    """
    if student.numel() <= PIECE:
        return _masked_sum(student, teacher, mask, temperature)
    length = max(PIECE * student.shape[1] // student.numel(), 1)
    pieces = zip(*(tensor.split(length, dim=1) for tensor in (student, teacher, mask)), strict=True)
    sums = [
        checkpoint(_masked_sum, *piece, temperature, use_reentrant=False, preserve_rng_state=False) for piece in pieces
    ]
    return torch.stack(sums).sum()


def _masked_sum(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
    # What is masked may be NaN or infinite. Masking the loss alone would leave a gradient of 0 * NaN.
    left_out = ~mask.unsqueeze(-1)
    return kd_loss(student.masked_fill(left_out, 0.0), teacher.masked_fill(left_out, 0.0), temperature).sum()


def _widest(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the device of a batch and the widest precision there, in which sums of counts are exact."""
    device = next((value.device for value in batch.values() if isinstance(value, Tensor)), torch.device("cpu"))
    labels = batch.get("labels")
    device = labels.device if isinstance(labels, Tensor) else device
    return {"device": device, "dtype": torch.float32 if device.type == "mps" else torch.float64}


def _countable(labels: Any) -> bool:
    return isinstance(labels, Tensor) and not labels.is_floating_point() and not labels.is_complex()
