"""What the parts of a training are given: what was decided before its first step, and what they may ask of Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..losses.fused_linear import LanguageDistillation
from ..losses.logits import LogitMatch, LogitMixture
from ..models.own_loss import DEFAULT_LOSS, OwnLoss
from ..models.tasks import Task
from .arriving import StopRequest


@dataclass(frozen=True)
class Plan:
    """Which terms are minimized, and on what.

    Attributes:
        shifts_labels: Whether position n predicts label n + 1 (causal language models).
        label_names: Columns of a batch that hold labels.
        student_computes_loss: Whether the student's forward takes labels and returns their loss.
        classes: Number of classes of a classifier of whole samples; None for any other head.
        match: Brings the logits of both models to the same classes.
        mixture: Joins the logits of several teachers; None for one.
        task_weight, logit_weight, feature_weight: With 0 a term is not computed.
        own_loss: How the loss that the student computes comes about.
        language: How task and logit term are computed without all logits at once; None where they are not.
    """

    task: Task
    shifts_labels: bool
    label_names: tuple[str, ...]
    student_computes_loss: bool
    classes: int | None
    match: LogitMatch
    mixture: LogitMixture | None
    temperature: float
    task_weight: float
    logit_weight: float
    feature_weight: float
    own_loss: OwnLoss = DEFAULT_LOSS
    language: LanguageDistillation | None = None

    @property
    def distills_logits(self) -> bool:
        """Whether the logit term is on."""
        return self.logit_weight > 0

    def labels_of(self, batch: Mapping[str, Any]) -> Any:
        """Return a batch's labels, whatever their column is called, or None."""
        return next((batch[name] for name in ("labels", *self.label_names) if name in batch), None)

    def with_labels(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the batch with its labels under the usual name, where a model calls them otherwise."""
        known = self.student_computes_loss and self.task != "single_label"
        labels = None if "labels" in batch or known else self.labels_of(batch)
        return batch if labels is None else {**batch, "labels": labels}


@dataclass(frozen=True)
class Services:
    """A few functions of the engine and of the user, in place of the trainer itself.

    Attributes:
        rank, processes: Number of this process, and of all; gradients are averaged over them.
        mixed_precision: `no`, `bf16` or `fp16`.
        autocast: Returns the context in which the student's forward runs.
        reduce_sum: Adds a tensor over processes; it stays on its device.
        shards: Whether parameters may be spread over processes (FSDP, DeepSpeed), or wrapped by an engine.
        custom_loss, label_smoother: `Trainer`'s `compute_loss_func` and `label_smoother`.
        stop: Whether this process was asked to stop, and whether all know of it.
    """

    device: torch.device
    rank: int
    processes: int
    is_main: bool
    mixed_precision: str
    autocast: Callable[[], AbstractContextManager[None]]
    reduce_sum: Callable[[Tensor], Tensor]
    custom_loss: Callable[..., Tensor] | None
    label_smoother: Callable[..., Tensor] | None
    stop: StopRequest
    shards: bool = False

    @classmethod
    def of(
        cls, accelerator: Accelerator, device: torch.device, custom_loss: Any, label_smoother: Any, stop: StopRequest
    ) -> Services:
        """Return the services of a training that an accelerator runs on a device."""
        processes = accelerator.num_processes

        def reduce_sum(tensor: Tensor) -> Tensor:
            if processes == 1:
                return tensor
            return accelerator.reduce(tensor.to(device), reduction="sum").to(tensor.device)

        return cls(
            device=device,
            rank=accelerator.process_index,
            processes=processes,
            is_main=accelerator.is_main_process,
            mixed_precision=accelerator.mixed_precision,
            autocast=accelerator.autocast,
            reduce_sum=reduce_sum,
            custom_loss=custom_loss,
            label_smoother=label_smoother,
            stop=stop,
            shards=accelerator.distributed_type.value.partition("_")[0] not in ("NO", "MULTI"),
        )
