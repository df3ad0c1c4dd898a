"""The task loss of a batch: the model's own, a user's function, label smoothing, or that of plain modules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..losses.logits import cross_entropy
from ..models.outputs import logits_of
from ..models.own_loss import ends_loss, has_ends
from .counts import StepCounts, safe_labels, scaled
from .plan import Plan, Services


@dataclass(frozen=True)
class TaskLoss:
    """Computes a micro-batch's share of the task loss of its optimizer step: what one batch of them all would give."""

    plan: Plan
    services: Services

    @property
    def drops_labels(self) -> bool:
        """Whether the student must not compute the task loss by itself."""
        elsewhere = self.services.custom_loss is not None or self.services.label_smoother is not None
        return elsewhere or self.plan.task_weight == 0 or not self.plan.student_computes_loss

    def __call__(self, outputs: Any, batch: Mapping[str, Any], counts: StepCounts) -> Tensor:
        """Return the micro-batch's share; without a single label, 0 that reaches every parameter."""
        labels = self.plan.labels_of(batch)
        if self.plan.shifts_labels and isinstance(labels, Tensor) and labels.dim() == 2 and labels.shape[1] < 2:
            # Nothing predicts a first token, whatever its label is.
            return zero_of(outputs)
        labels = safe_labels(labels, counts.items)
        if self.services.custom_loss is not None:
            total = counts.totals[0].clamp(min=1).to(self.services.device, torch.float32, non_blocking=True)
            loss = self.services.custom_loss(outputs, labels, num_items_in_batch=total)
            return scaled(loss, (counts.items > 0) * counts.processes)
        if self.services.label_smoother is not None and labels is not None:
            loss = self.services.label_smoother(outputs, labels, shift_labels=self.plan.shifts_labels)
        elif not self.plan.student_computes_loss:
            loss = cross_entropy(logits_of(outputs, "student"), labels)
        elif counts.ends is not None and has_ends(batch):
            return ends_loss(outputs, batch, counts.ends) * counts.processes
        else:
            loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
            if self.plan.own_loss.adds:
                return loss * counts.processes
        return scaled(loss, counts.task_scale())


def zero_of(outputs: Any) -> Tensor:
    """Return a zero that depends on a model's outputs, so that backward reaches every parameter."""
    if isinstance(outputs, Mapping):
        outputs = tuple(outputs.values())
    values = outputs if isinstance(outputs, tuple) else (outputs,)
    tensors = [value for value in values if isinstance(value, Tensor) and value.requires_grad and value.dim()]
    # Sums of nothing: outputs of padding may be infinite.
    return torch.stack([tensor.flatten()[:0].sum() for tensor in tensors]).sum() if tensors else torch.zeros(())


def plain_module_loss(
    model: nn.Module, inputs: Mapping[str, Any], label_names: Sequence[str], return_outputs: bool
) -> Any:
    """Return the usual loss of a model that computes none, as `Trainer.compute_loss` would; None without labels."""
    names = dict.fromkeys(("labels", *label_names))
    labels = next((inputs[name] for name in names if name in inputs), None)
    if labels is None:
        return None
    logits = logits_of(model(**{key: value for key, value in inputs.items() if key not in names}), "student")
    loss = cross_entropy(logits, labels)
    return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss
