"""What is kept besides the student in a checkpoint, and reloading that tolerates no missing weight."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer

from ..config import SemCKDConfig
from ..errors import CheckpointError
from ..files import write_json
from ..losses import FeatureLoss
from ..publishing.environment import environment
from .attachment import without_feature_loss

logger = logging.getLogger(__name__)

FEATURE_LOSS_FILE = "feature_loss.safetensors"

SETTINGS_FILE = "distillation_config.json"

PICKLED_ARGUMENTS = "training_args.bin"

OPTIMIZER_FILE = "optimizer.pt"

RECORDED_ARGUMENTS = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "optim",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
    "seed",
    "bf16",
    "fp16",
)


def save_feature_loss(loss: FeatureLoss, folder: str | os.PathLike[str]) -> None:
    """Write the feature loss (projections, association, running statistics) beside the optimizer's state."""
    state = {name: tensor.contiguous() for name, tensor in loss.state_dict().items()}
    save_file(state, Path(folder) / FEATURE_LOSS_FILE)


def load_feature_loss(loss: FeatureLoss, folder: str | os.PathLike[str]) -> None:
    """Read the feature loss back.

    Raises:
        CheckpointError: When the checkpoint has none, or one of another shape.
    """
    path = Path(folder) / FEATURE_LOSS_FILE
    if not loss.state_dict():
        return
    if not path.is_file():
        raise CheckpointError(
            "The checkpoint holds no calibration to resume from",
            received=f"no {FEATURE_LOSS_FILE} in the checkpoint",
            expected="a checkpoint written by this trainer with feature distillation on",
            todo="resume from another checkpoint, or start a new run with this checkpoint's student as the model",
        )
    try:
        loss.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise CheckpointError(
            "The checkpoint's calibration does not fit this run",
            received=str(error),
            expected="the layers, association and projector that the checkpoint was trained with",
            todo=f"compare {SETTINGS_FILE} in the checkpoint with your configuration",
        ) from error


def reload_student(student: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Load a checkpoint's weights into the student, all of them.

    Checkpoints use the Hub's key names, which differ from those of the live modules for some families. Only
    `from_pretrained` translates them; a lenient `load_state_dict` would skip them silently.

    Raises:
        CheckpointError: When a weight is missing, unexpected or of another shape.
    """
    loaded, info = type(student).from_pretrained(
        os.fspath(folder),
        config=student.config,
        dtype=student.dtype,
        output_loading_info=True,
        # Reported below, with the others; from_pretrained would raise its own error.
        ignore_mismatched_sizes=True,
    )
    wrong = {
        kind: sorted(map(str, info[kind]))
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[kind]
    }
    if wrong:
        raise CheckpointError(
            "The checkpoint does not fit the student",
            received=json.dumps({kind: names[:5] for kind, names in wrong.items()}),
            expected=f"exactly the weights of {type(student).__name__}",
            todo="resume with the student that the checkpoint was written for",
        )
    student.load_state_dict(loaded.state_dict())


def save_settings(
    config: SemCKDConfig, folder: str | os.PathLike[str], teacher: nn.Module | None, settings: Mapping[str, Any]
) -> None:
    """Write what was asked of the training, without paths and tokens, for the record: loading does not need it."""
    written: dict[str, Any] = {
        "distillation": dict(settings),
        "training": {name: _plain(getattr(config, name, None)) for name in RECORDED_ARGUMENTS},
        "teacher": type(teacher).__name__ if teacher is not None else None,
        "versions": environment(),
    }
    write_json(Path(folder) / SETTINGS_FILE, written)


class CheckpointingTrainer(Trainer):
    """Saving the plain student, and resuming exactly; a base of `DistillationTrainer`."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self._plain_student():
            super()._save(output_dir, None if state_dict is None else without_feature_loss(state_dict))
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.args.should_save:
            # Trainer pickles its arguments, which only this library could read back: JSON says the same to anyone.
            (folder / PICKLED_ARGUMENTS).unlink(missing_ok=True)
            save_settings(self.args, folder, self._teacher_model, self.distillation_settings())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._attached and self.feature_loss is not None and self._reloads_here:
            # What the last step observed belongs to this checkpoint, on every process.
            self.feature_loss.synchronize(self._sum_over_processes)
            if self.args.should_save:
                save_feature_loss(self.feature_loss, output_dir)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._distils or not self._reloads_here:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with self._plain_student():
            if isinstance(self.model, PreTrainedModel):
                reload_student(self.model, resume_from_checkpoint)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._attached and self.feature_loss is not None:
            if (Path(resume_from_checkpoint) / OPTIMIZER_FILE).is_file():
                load_feature_loss(self.feature_loss, resume_from_checkpoint)
            else:
                logger.warning(
                    "The checkpoint holds the student alone (save_only_model): projections, association and optimizer "
                    "start anew, so the run goes on but is not the one that was interrupted."
                )

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        with self._plain_student():
            if self._distils and self._reloads_here and isinstance(self.model, PreTrainedModel) and best is not None:
                reload_student(self.model, best)
            else:
                super()._load_best_model()

    @property
    def _reloads_here(self) -> bool:
        """Whether checkpoints hold whole tensors; FSDP and DeepSpeed carry the calibration in their own state."""
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)
