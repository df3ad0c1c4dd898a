"""Trainings that are interrupted and resumed, and all that their checkpoints hold, for comparing them bit for bit."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from makers import bert, config, images, resnet, texts, vit
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from hf_semckd import SemCKDTrainer

HALF, WHOLE = 3, 6
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
# Student, teacher, data: 20 samples are five steps, so that a training resumes in the middle of an epoch.
FAMILIES = {
    "vit": (partial(vit, **DROPOUT), partial(vit, 3, 24, seed=9), partial(images, 20)),
    "bert": (partial(bert, **DROPOUT), partial(bert, 3, 24, seed=9), partial(texts, 20)),
    "resnet": (resnet, partial(resnet, (8, 16), seed=9), partial(images, 20)),
}
ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


class Stop(TrainerCallback):
    """Ends the training after a step: regularly, or as a power cut does."""

    def __init__(self, step: int, dead: bool = False):
        self.step, self.dead = step, dead

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.dead:
                os._exit(9)
            control.should_training_stop = True


def trainer_of(
    family: str, folder: Path, callbacks: Any = (), student: Any = None, optimizers: Any = (None, None), **args: Any
) -> SemCKDTrainer:
    """Return a trainer of fresh objects that takes `WHOLE` steps."""
    make_student, teacher, data = FAMILIES[family]
    settings = {"max_steps": WHOLE, "save_strategy": "steps", "save_steps": HALF, **args}
    return SemCKDTrainer(
        model=make_student() if student is None else student,
        teacher_model=teacher(),
        args=config(folder, **settings),
        train_dataset=data(),
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


def fit(trainer: SemCKDTrainer, checkpoint: Any = None) -> SemCKDTrainer:
    """Train without drawing the association."""
    with mock.patch("hf_semckd.training.callbacks.save_association_plot"):
        trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries and lists by their path."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    )
    if entries is None:
        return {name: value}
    return {path: leaf for key, entry in entries for path, leaf in flat(entry, f"{name}/{key}").items()}


def checkpoint(folder: Path, step: int = WHOLE) -> dict[str, Any]:
    """Return all that a checkpoint holds: tensors, states, random states, and the log."""
    place = folder / f"checkpoint-{step}"
    held = {path.name: load_file(path) for path in sorted(place.glob("*.safetensors"))}
    for name in ("optimizer.pt", "scheduler.pt"):
        held[name] = torch.load(place / name, weights_only=True)
    states = sorted(place.glob("rng_state*.pth"))
    held["random"] = [torch.load(path, weights_only=False)["cpu"] for path in states]
    state = json.loads((place / "trainer_state.json").read_text())
    held["log"] = [row for row in state["log_history"] if "loss" in row]
    held["step"] = state["global_step"]
    return flat(held)


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Compare leaves, bit for bit."""
    assert first.keys() == second.keys()
    different = [
        name
        for name, value in first.items()
        if not (torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name])
    ]
    assert not different
