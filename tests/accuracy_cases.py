"""Protocols, rows and methods that the tests of scripts/accuracy share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accuracy.data import Rows
from launching import ROOT

PROTOCOLS = ROOT / "scripts" / "protocols"
TEACHER = {"name": "vit-3x24", "family": "vit", "width": 24, "depth": 3, "size": 8, "patch": 4}
STUDENT = {"name": "vit-2x24", "family": "vit", "width": 24, "depth": 2, "size": 8, "patch": 4}
TRAINING = {"num_train_epochs": 1, "learning_rate": 0.002, "per_device_train_batch_size": 20}


def write_protocol(folder: Path, **changes: Any) -> Path:
    """Write a protocol file; a key that is changed to None is left out."""
    content = {
        "description": "a check",
        "data": {"name": "digits", "train": 40, "validation": 50, "test": 60},
        "teacher": {**TEACHER, "training": {**TRAINING, "num_train_epochs": 2}},
        "student": STUDENT,
        "training": TRAINING,
        "tuning_seeds": [100],
        "test_seeds": [0],
        "methods": ["student", "kd", "semckd", "semckd-tuned"],
        **changes,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def rows_of(labels: Sequence[int], classes: int) -> Rows:
    """Rows whose one input is their place."""
    return Rows({"place": torch.arange(len(labels)), "labels": torch.tensor(labels)}, classes)


def row(protocol: str = "digits", method: str = "semckd", seed: int = 1, value: float = 0.75, **changes: Any) -> Any:
    """A valid row."""
    return {
        "protocol": protocol,
        "teacher": "ViT-6",
        "student": "ViT-3",
        "method": method,
        "seed": seed,
        "split": "test",
        "metric": "accuracy",
        "value": value,
        "settings": {"tuned": {}, "epochs": 3},
        "commit": "abc",
        "versions": {"torch": "2.0"},
        "machine": "a processor",
        "seconds": 1.5,
        "parameters": 10,
        "extras": {},
        **changes,
    }


def map_rows() -> list[dict[str, Any]]:
    return [
        row("m", "kd", 0, 0.50),
        row("m", "kd", 1, 0.60),
        row("m", "kd", 2, 0.10),
        row("m", "pair-1-1", 0, 0.51),
        row("m", "pair-1-1", 1, 0.63),
        row("m", "pair-2-3", 1, 0.55),
        row("m", "pair-2-3", 7, 0.99),  # the baseline has no such seed
        row("m", "pair-2-1", 0, 0.99, split="tuning"),
        row("m", "semckd", 0, 0.7),
        row("other", "pair-3-3", 0, 0.9),
    ]


def curve_rows() -> list[dict[str, Any]]:
    values = {("c@30", "kd"): [0.5, 0.6, 0.7], ("c@0.3", "kd"): [0.2], ("c@3", "semckd"): [0.4, 0.6]}
    found = [row(p, method, seed, value) for (p, method), v in values.items() for seed, value in enumerate(v)]
    return [*found, row("c@30", "teacher", 0, 0.9), row("c", "kd", 0, 0.1), row("cc@5", "kd", 0, 0.1)]
