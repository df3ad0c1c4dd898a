"""The trainers that are compared, and a step of one: what `Trainer.train` does with a micro-batch."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_semckd import DistillationTrainer, SemCKDConfig, SemCKDTrainer

from .pairs import Pair

# In the order in which a round runs them.
NAMES = ("ce", "kd", "semckd", "published", "cached")


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle: kernels on a GPU are launched asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Variant:
    """A trainer that is ready to step, as it is in the middle of `train()`.

    The constructor does what `train()` does before its loop: attach, make the optimizer, let accelerate prepare both.

    Args:
        name: One of `NAMES`.
        trainer: Its trainer, newly made.
    """

    def __init__(self, name: str, trainer: Trainer):
        self.name = name
        self.trainer = trainer
        self.device = trainer.args.device
        if isinstance(trainer, DistillationTrainer):
            trainer.distillation.attach()
        trainer.create_optimizer()
        self.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = self.model
        trainer.is_in_train = True
        self.model.train()

    @property
    def feature_loss(self) -> Any:
        """The feature loss that trains with the student, or None."""
        return getattr(self.trainer, "feature_loss", None)

    def compute_gradients(self, batch: Mapping[str, Tensor]) -> None:
        """Count the batch's items, update statistics, and run forward and backward."""
        batches, items = self.trainer.get_batch_samples(iter([batch]), 1, self.device)
        self.trainer.current_gradient_accumulation_steps = len(batches)
        self.trainer.training_step(self.model, batches[0], items)

    def step(self, batch: Mapping[str, Tensor]) -> float:
        """Do all of a step but the optimizer's part; return the seconds it took."""
        synchronize(self.device)
        begin = time.perf_counter()
        self.compute_gradients(batch)
        self.model.zero_grad()
        synchronize(self.device)
        return time.perf_counter() - begin

    def update(self) -> None:
        """Do the optimizer's part of a step: clip the gradients and change the weights."""
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
        self.trainer.optimizer.step()

    def parameters(self) -> dict[str, int]:
        """Count the student's own parameters, and those of the feature loss: its projections and networks."""
        loss = self.feature_loss
        added = _count(loss) if loss is not None else 0
        return {"student": _count(self.trainer.model) - added, "feature_loss": added}

    def close(self) -> None:
        """Take the feature loss off the student again."""
        self.trainer.is_in_train = False
        if isinstance(self.trainer, DistillationTrainer):
            self.trainer.distillation.detach()


def make_variant(
    name: str, pair: Pair, student: nn.Module, teacher: nn.Module | None, device: str, folder: Path
) -> Variant:
    """Return a variant of a pair, ready to step; see `make_trainer`."""
    return Variant(name, make_trainer(name, pair, student, teacher, device, folder))


def make_trainer(
    name: str, pair: Pair, student: nn.Module, teacher: nn.Module | None, device: str, folder: Path
) -> Trainer:
    """Return the trainer of a variant, as a user would make it.

    Args:
        name: One of `NAMES`.
        pair: The pair, for its batch size and data.
        student: The student, of which a copy is trained.
        teacher: The teacher, which is shared; `ce` takes none.
        device: `cpu` or `cuda`.
        folder: For what a trainer writes, and for the cache.
    """
    shared: dict[str, Any] = {
        "output_dir": str(folder / name),
        "per_device_train_batch_size": pair.batch_size,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
        "bf16": device == "cuda",
    }
    batch = pair.make_batches(1)[0]
    dataset = [{key: value[index] for key, value in batch.items()} for index in range(pair.batch_size)]
    model = copy.deepcopy(student)
    if name == "ce":
        return Trainer(model, TrainingArguments(**shared), train_dataset=dataset)
    if name == "published":
        args = SemCKDConfig.published(**shared, dataloader_drop_last=True)
    else:
        args = SemCKDConfig(**shared, teacher_cache_dir=str(folder / "teacher") if name == "cached" else None)
    kind = DistillationTrainer if name == "kd" else SemCKDTrainer
    return kind(model, args, train_dataset=dataset, teacher_model=teacher)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
