"""Which engine a training runs on, which one wrote a checkpoint, and which checkpoints it can go on from."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate import Accelerator

from ..config import SemCKDConfig
from ..errors import CheckpointError, ConfigurationError, InputError
from ..launch import launched_processes

logger = logging.getLogger(__name__)
EngineName = Literal["one process or DDP", "FSDP", "DeepSpeed"]


@dataclass(frozen=True)
class Engine:
    """How a model is held by several processes.

    Attributes:
        name: DDP gives each process all of it; a checkpoint of a single process is the same.
        processes: Their number.
        stage: ZeRO's, 0 for other engines.
    """

    name: EngineName
    processes: int
    stage: int = 0

    @classmethod
    def of(cls, accelerator: Accelerator) -> Engine:
        """Return the engine that an accelerator trains on."""
        state, processes = accelerator.state, accelerator.num_processes
        plugin = getattr(state, "deepspeed_plugin", None)
        if plugin is not None:
            return cls("DeepSpeed", processes, int(plugin.zero_stage))
        return cls("one process or DDP" if getattr(state, "fsdp_plugin", None) is None else "FSDP", processes)

    @classmethod
    def of_checkpoint(cls, folder: Path) -> Engine:
        """Return the engine that wrote a checkpoint, by its files."""
        states = len(list(folder.glob("rng_state_*.pth"))) or 1
        if (folder / "latest").is_file():
            # ZeRO-3 has the weights of every process beside its optimizer; the others have one file of weights.
            whole = any(folder.glob("global_step*/mp_rank_*_model_states.pt"))
            return cls("DeepSpeed", states, 0 if whole else 3)
        if any(folder.glob("pytorch_model_fsdp*")):
            return cls("FSDP", states)
        return cls("one process or DDP", states)

    @property
    def described(self) -> str:
        """The engine in words."""
        name = f"{self.name} ZeRO-{self.stage}" if self.stage else self.name
        return f"{name}, {self.processes} process{'es' * (self.processes != 1)}"


def saves_in_parts(accelerator: Accelerator) -> bool:
    """Whether FSDP writes each process's part of the weights, which is nothing that `from_pretrained` reads."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and "FULL" not in str(plugin.state_dict_type)


def check_engine(checkpoint: str | None, engine: Engine) -> None:
    """Refuse (`CheckpointError`) a checkpoint whose optimizer state another engine cannot read.

    FSDP and DDP go on with another number of processes, DeepSpeed divides its state by it.
    """
    if checkpoint is None:
        return
    folder = Path(checkpoint)
    written = Engine.of_checkpoint(folder)
    same = written.name == engine.name
    if same and engine.name == "DeepSpeed":
        same = written.processes == engine.processes and (written.stage == 3) == (engine.stage == 3)
    if same:
        return
    raise CheckpointError(
        "The checkpoint was written by another engine",
        received=f"{folder.name} of {written.described}; this training runs on {engine.described}",
        expected="the same engine" + (", ZeRO stage and number of processes" * (engine.name == "DeepSpeed")),
        todo="start with the accelerate configuration and number of processes that wrote it, or start a new training "
        "whose student is the one that save_model or the checkpoint's model.safetensors holds",
    )


def leave_gpus_to_teacher(config: SemCKDConfig, teachers: Sequence[object]) -> None:
    """Let a process that sees several GPUs train on the first one, where a teacher is divided among all of them.

    Trainer does the same for a student that is divided.
    """
    divided = any(len(set((getattr(teacher, "hf_device_map", None) or {}).values())) > 1 for teacher in teachers)
    if config.n_gpu > 1 and (divided or config.teacher_placement == "device_map"):
        config._n_gpu = 1


def check_parallelism(accelerator: Accelerator, config: SemCKDConfig) -> None:
    """Refuse processes that do not train together, torch's DataParallel, and a DeepSpeed scheduler that would overrule
    the projections' learning rate.

    The replicas of DataParallel share no running statistics and lose gradients of the projections.
    """
    _check_launch(accelerator)
    if config.n_gpu > 1:
        raise InputError(
            "One process would drive several GPUs (DataParallel), which distillation does not support",
            received=f"{config.n_gpu} GPUs in one process",
            expected="one process a GPU",
            todo="start with `accelerate launch script.py` or `torchrun`, set CUDA_VISIBLE_DEVICES to one GPU, or "
            "give the others to the teacher with teacher_placement='device_map'",
        )
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    rate, projection_rate = config.learning_rate, config.resolved_projection_learning_rate()
    if plugin is not None and "scheduler" in plugin.deepspeed_config and rate != projection_rate:
        raise ConfigurationError(
            "DeepSpeed's scheduler gives all parameters one learning rate",
            received=f"learning_rate={rate:g}, projection_learning_rate={projection_rate:g}, and a scheduler in "
            "DeepSpeed's configuration",
            expected="one learning rate, or Trainer's own schedule (lr_scheduler_type)",
            todo=f"take the scheduler out of DeepSpeed's configuration, or set projection_learning_rate={rate:g}",
        )


def _check_launch(accelerator: Accelerator) -> None:
    """Refuse processes that were started together and train alone; tell of FSDP that was asked for and is off."""
    started = launched_processes()
    if started > 1 and accelerator.num_processes == 1:
        raise ConfigurationError(
            "The processes that were started do not train together: each would train alone, in one folder",
            received=f"{started} processes, no GPU, and use_cpu=False",
            expected="use_cpu=True on a machine without GPUs, or one process",
            todo="set use_cpu=True in the arguments (--use_cpu True), or start the script by itself",
        )
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
    if asked and getattr(accelerator.state, "fsdp_plugin", None) is None:
        logger.warning(
            "FSDP was asked for and is off: Accelerate runs it on GPUs alone. Each process has a whole copy."
        )
