"""Knowledge distillation for the Hugging Face ecosystem: features of all teacher layers, no layer map needed."""

import importlib
from typing import Any

from .version import __version__

# Imported on first use: `import hf_semckd` alone loads neither torch nor transformers.
_HOMES = {
    "DistillationTrainer": "training.trainer",
    "SemCKDConfig": "config",
    "SemCKDTrainer": "training.trainer",
    "evaluate": "evaluation.evaluate",
    "export_onnx": "evaluation.export",
    "inspect_models": "training.report",
    "make_student": "models.students",
}

__all__ = [
    "DistillationTrainer",
    "SemCKDConfig",
    "SemCKDTrainer",
    "__version__",
    "evaluate",
    "export_onnx",
    "inspect_models",
    "make_student",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
