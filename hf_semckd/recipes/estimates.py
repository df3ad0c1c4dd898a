"""What a training takes, from a few steps of it on this machine: seconds, memory, and bytes of a teacher cache."""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..config import SemCKDConfig
from ..errors import InputError
from ..evaluation.memory import own_peak
from ..training.memory import MemoryEstimate
from .progress import Voice, use_progress
from .schema import Recipe
from .training import Prepared, student_trainer, teacher_trainer

WARM_UP, MEASURED = 2, 4
# Samples of which a cache is filled, to learn how large it will be.
CACHED_SAMPLES = 64


@dataclass(frozen=True)
class Cost:
    """Seconds of an optimizer step, and the process's (or GPU's) peak memory in bytes, None where it is not told.

    `memory` is what the trainer expected to take, part by part; None of a training that is no distillation.
    """

    seconds: float
    peak_bytes: int | None
    memory: MemoryEstimate | None = None


@dataclass(frozen=True)
class CacheCost:
    """Seconds and bytes of a sample whose teacher outputs are stored, and the cost of a step that reads them."""

    seconds: float
    bytes: float
    step: Cost


class _Clock(TrainerCallback):
    """Notes when steps end; the device has finished by then."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def student_cost(recipe: Recipe, args: SemCKDConfig, prepared: Prepared) -> Cost:
    """Return the cost of a step of a recipe, measured on a copy of the student."""
    with tempfile.TemporaryDirectory() as folder:
        trial = replace(prepared, student=copy.deepcopy(prepared.student))
        return _measured(student_trainer(recipe, _trial_args(args, folder, teacher_cache_dir=None), trial))


def teacher_cost(args: SemCKDConfig, prepared: Prepared) -> Cost:
    """Return the cost of a step of the teacher's own training."""
    with tempfile.TemporaryDirectory() as folder:
        model = copy.deepcopy(prepared.teachers[0])
        trial = _trial_args(args, folder, teacher_cache_dir=None)
        return _measured(teacher_trainer(trial, model, prepared.rows, prepared.samples))


def cache_cost(recipe: Recipe, args: SemCKDConfig, prepared: Prepared) -> CacheCost:
    """Return the cost of a teacher cache, of which a small one is filled and used."""
    splits = prepared.samples.splits
    few = splits.train.select(range(min(CACHED_SAMPLES, len(splits.train))))
    samples = replace(prepared.samples, splits=replace(splits, train=few))
    trial = replace(prepared, student=copy.deepcopy(prepared.student), samples=samples)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        trainer = student_trainer(recipe, _trial_args(args, folder, teacher_cache_dir=str(cache)), trial)
        started = time.perf_counter()
        count = trainer.fill_teacher_cache()
        seconds = (time.perf_counter() - started) / max(count, 1)
        size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / max(count, 1)
        return CacheCost(seconds, size, _measured(trainer))


def _trial_args(args: SemCKDConfig, folder: str, **changes: Any) -> SemCKDConfig:
    quiet = {"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    plain = {"output_dir": folder, "max_steps": WARM_UP + MEASURED, "push_to_hub": False, "report_to": []}
    return replace(args, **{**quiet, **plain, "load_best_model_at_end": False, **changes})


def _measured(trainer: Any) -> Cost:
    clock = _Clock()
    use_progress(trainer, "", Voice(speaks=False))
    trainer.add_callback(clock)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    gaps = [later - earlier for earlier, later in zip(clock.times[WARM_UP - 1 :], clock.times[WARM_UP:], strict=False)]
    if not gaps:
        raise InputError(
            "There are too few samples to measure a step",
            received=f"{len(clock.times)} steps",
            expected=f"at least {WARM_UP + 1}",
            todo="lower per_device_train_batch_size or gradient_accumulation_steps",
        )
    peak, distillation = _peak_bytes(), getattr(trainer, "distillation", None)
    memory = None
    if distillation is not None:
        memory = distillation.memory(trainer.args.train_batch_size, trainer.args, trainer.optimizer)
    return Cost(sorted(gaps)[len(gaps) // 2], peak, memory)


def _peak_bytes() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else own_peak()
