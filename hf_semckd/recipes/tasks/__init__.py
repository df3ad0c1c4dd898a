"""The tasks that a recipe can name, and which of them a teacher and the data are about."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Features

from ...errors import ConfigurationError
from ..schema import DataOptions
from .answers import QuestionAnswering
from .base import Columns, Task
from .generation import TextGeneration, TextToText
from .images import ImageClassification
from .sounds import AudioClassification
from .text import TextClassification, TokenClassification

TASKS: tuple[type[Task], ...] = (
    ImageClassification,
    AudioClassification,
    QuestionAnswering,
    TokenClassification,
    TextClassification,
    TextToText,
    TextGeneration,
)


def find_task(architectures: Sequence[str], features: Features, options: DataOptions) -> type[Task]:
    """Return the task that the recipe names, or that of the teacher's head, or the first one that fits the columns.

    Raises `ConfigurationError` where none does.
    """
    if options.task is not None:
        return next(task for task in TASKS if task.name == options.task)
    fitting = [task for task in TASKS if task.find_columns(features, options) is not None]
    by_head = [task for task in TASKS if any(name.endswith(task.heads) for name in architectures)]
    found = [task for task in fitting if task in by_head] or by_head or fitting
    if not found:
        raise ConfigurationError(
            "What is to be learned is not told by the teacher or the data",
            received=f"a teacher {' '.join(architectures) or 'without a head'}, columns {', '.join(features)}",
            expected="a teacher with a head, or columns such as text and label, or image and label",
            todo=f"set task to one of {', '.join(task.name for task in TASKS)}, and input_columns and label_column",
        )
    return found[0]


def task_columns(task: type[Task], features: Features, options: DataOptions) -> Columns:
    """Return the columns that the task reads; `ConfigurationError` where they cannot be told."""
    found = task.find_columns(features, options)
    if found is None:
        raise ConfigurationError(
            f"Which columns are those of {task.name} is not clear",
            received=", ".join(
                f"{name} ({getattr(entry, 'dtype', type(entry).__name__)})" for name, entry in features.items()
            ),
            expected="one column of each kind, or usual names",
            todo="set input_columns" + (" and label_column" if task is not TextGeneration else ""),
        )
    return found
