"""What is kept besides the student in a checkpoint, and reloading that tolerates no missing weight."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, TrainerState

from ..config import SemCKDConfig
from ..errors import CheckpointError
from ..files import json_text, write_json
from ..losses import FeatureLoss
from ..publishing.facts import environment
from ..publishing.folder import SETTINGS_FILE, STATE_FILE
from ..publishing.sources import dataset_source, hub_source, source_of
from .optimizer import difference
from .sealing import SEAL

logger = logging.getLogger(__name__)
FEATURE_LOSS_FILE = "feature_loss.safetensors"
PICKLED_ARGUMENTS = "training_args.bin"
OPTIMIZER_FILE = "optimizer.pt"
SCHEDULER_FILE = "scheduler.pt"
# A checkpoint's files that only resuming needs.
RESUMED = (
    "optimizer*",
    SCHEDULER_FILE,
    "scaler.pt",
    "rng_state*",
    STATE_FILE,
    SEAL,
    PICKLED_ARGUMENTS,
    FEATURE_LOSS_FILE,
)
# With the weights of an engine, those that are not published.
TRAINING_STATE = (*RESUMED, "pytorch_model_fsdp*", "global_step*")
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


def resume_feature_loss(loss: FeatureLoss, folder: str | os.PathLike[str]) -> None:
    """Read the feature loss back; `CheckpointError` when it does not fit, or is missing where the optimizer is not.

    Where neither is there it starts anew; see `warn_of_missing`.
    """
    if not loss.state_dict():
        return
    path = Path(folder) / FEATURE_LOSS_FILE
    if not path.is_file():
        if not (Path(folder) / OPTIMIZER_FILE).is_file():
            return
        raise CheckpointError(
            "The checkpoint holds no feature loss to resume from",
            received=f"no {FEATURE_LOSS_FILE} in the checkpoint",
            expected="a checkpoint written by this trainer with feature distillation on",
            todo="resume from another checkpoint, or start a new run with this checkpoint's student as the model",
        )
    try:
        loss.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise CheckpointError(
            "The checkpoint's feature loss does not fit this run",
            received=str(error),
            expected="the layers, association and projector that the checkpoint was trained with",
            todo=f"compare {SETTINGS_FILE} in the checkpoint with your configuration",
        ) from error


def warn_of_missing(
    folder: str | os.PathLike[str], random_state: str, *, feature_loss: bool, is_main: bool = True
) -> None:
    """Warn once of what a checkpoint lacks and what therefore starts anew: `Trainer` says nothing.

    Args:
        random_state: Name of this process's file; of others than the main one it is all that is looked for.
        feature_loss: Whether there is one to go on with.
    """
    there = {name for name in (OPTIMIZER_FILE, SCHEDULER_FILE, random_state) if (Path(folder) / name).is_file()}
    lost, anew = list[str](), list[str]()
    if not {OPTIMIZER_FILE, SCHEDULER_FILE} <= there and is_main:
        lost += [name for name in (OPTIMIZER_FILE, SCHEDULER_FILE) if name not in there]
        # Trainer loads both or none.
        anew.append("optimizer and schedule of the learning rate")
    if random_state not in there and (there or is_main):
        lost, anew = [*lost, random_state], [*anew, "random numbers"]
    if feature_loss and is_main and not (Path(folder) / FEATURE_LOSS_FILE).is_file():
        lost, anew = [*lost, FEATURE_LOSS_FILE], [*anew, "projections and association"]
    if lost:
        told = "The checkpoint holds the student alone (save_only_model)"
        if there or (feature_loss and FEATURE_LOSS_FILE not in lost):
            told = f"{Path(folder).name} lacks {', '.join(lost)}"
        end = "start anew, so the run goes on but is not the one that was interrupted."
        logger.warning("%s: %s %s", told, ", ".join(anew), end)


def check_optimizer(optimizer: torch.optim.Optimizer, folder: str | os.PathLike[str], now: Mapping[str, Any]) -> None:
    """Refuse (`CheckpointError`) a checkpoint whose optimizer's state is not one for this optimizer.

    `now` are the settings of this run, by the names that the checkpoint's own have, to tell which differ.
    """
    place = Path(folder)
    if not all((place / name).is_file() for name in (OPTIMIZER_FILE, SCHEDULER_FILE)):
        return
    # Mapped, not read: of the moments only the shapes are looked at.
    saved = torch.load(place / OPTIMIZER_FILE, map_location="cpu", mmap=True, weights_only=True)
    found = difference(optimizer, saved) if isinstance(saved, dict) and "param_groups" in saved else None
    if found is None:
        return
    then, changed = _recorded_settings(place), json.loads(json_text(now))
    # None: left open, and not decided in this run.
    names = [name for name in changed if name in then and None is not changed[name] != then[name]]
    written, present = (", ".join(f"{name}={side[name]!r}" for name in names) for side in (then, changed))
    raise CheckpointError(
        "The checkpoint's optimizer does not fit this run",
        received=f"{place.name}{f' trained with {written}' if names else ''}: {found[0]}",
        expected=f"{found[1]}{f'; this run has {present}' if names else ''}",
        todo="resume with the arguments, optimizer and frozen weights that the checkpoint was trained with "
        f"({SETTINGS_FILE} in it tells the arguments), or start anew from its weights: load the student with "
        "from_pretrained and the checkpoint's folder, and train without resume_from_checkpoint",
    )


def _recorded_settings(checkpoint: Path) -> dict[str, Any]:
    try:
        written = json.loads((checkpoint / SETTINGS_FILE).read_text(encoding="utf-8"))
        return {"method": written["method"], "optim": written["training"]["optim"], **written["distillation"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # of plain Trainer


def reload_student(student: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Load a checkpoint's weights into the student; `CheckpointError` unless all of them fit.

    Checkpoints use the Hub's key names, which differ from those of the live modules for some families. Only
    `from_pretrained` translates them; a lenient `load_state_dict` would skip them silently.
    """
    try:
        loaded, info = type(student).from_pretrained(
            os.fspath(folder),
            config=student.config,
            dtype=student.dtype,
            output_loading_info=True,
            # Reported below, with the others; from_pretrained would raise its own error.
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            "The checkpoint's weights cannot be read",
            received=f"{Path(folder).name}: {error}",
            expected=f"the whole weights of {type(student).__name__}, as save_pretrained writes them",
            todo="resume from another checkpoint, with a student of the kind that it was written for",
        ) from error
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(map(str, info[kind]))[:5] for kind in kinds if info[kind]}
    if wrong:
        raise CheckpointError(
            "The checkpoint does not fit the student",
            received=json.dumps(wrong),
            expected=f"exactly the weights of {type(student).__name__}",
            todo="resume with the student that the checkpoint was written for",
        )
    student.load_state_dict(loaded.state_dict())


def recorded_arguments(config: SemCKDConfig, state: TrainerState) -> dict[str, Any]:
    """Return the arguments of a training that tell how to repeat it, ready for JSON; none of them is a path.

    `state` knows the batch size that `auto_find_batch_size` came to.
    """
    arguments = {name: getattr(config, name, None) for name in RECORDED_ARGUMENTS}
    found = {name: getattr(value, "value", value) for name, value in arguments.items()}
    size = config.train_batch_size
    if config.auto_find_batch_size and state.train_batch_size is not None:
        size = state.train_batch_size
        found["per_device_train_batch_size"] = size // max(1, config.n_gpu)
    found["total_train_batch_size"] = size * config.gradient_accumulation_steps * config.world_size
    return found


def finish_folder(
    folder: Path,
    training: Mapping[str, Any],
    student: nn.Module,
    teachers: Sequence[nn.Module],
    distillation: Mapping[str, Any],
    record: Mapping[str, Any],
    dataset: Any,
) -> None:
    """Write the settings, without paths and tokens, beside a saved student, for the record: loading needs none.

    `training` are the `recorded_arguments`, and `record` is what a report needs besides. The file takes the place of
    Trainer's pickled arguments, which only this library could read back.
    """
    (folder / PICKLED_ARGUMENTS).unlink(missing_ok=True)
    names = [source_of(teacher).name for teacher in teachers]
    written = {
        "distillation": dict(distillation),
        "training": dict(training),
        "base_model": hub_source(student),
        "dataset": dataset_source(dataset),
        "teacher": names[0] if len(names) == 1 else names,
        **record,
        "versions": environment(),
    }
    write_json(folder / SETTINGS_FILE, written)
