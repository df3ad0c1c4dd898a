"""The rows of a recipe, and what they are about: the task, its columns and classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigurationError
from ..models.tasks import class_names
from .classes import Classes, as_by_teacher, find_classes
from .data import chosen_rows, flat_translations
from .models import has_head, read_config
from .progress import Voice
from .schema import DataOptions, Recipe
from .sources import Splits, load_splits
from .tasks import find_task, task_columns
from .tasks.base import Columns, Task


@dataclass(frozen=True)
class Rows:
    """The rows of a recipe and what they are about."""

    kind: type[Task]
    columns: Columns
    classes: Classes | None
    splits: Splits

    def task(self, options: DataOptions, length: int) -> Task:
        """Return what makes samples of the rows."""
        return self.kind(self.columns, self.classes, options, length)


def read_rows(recipe: Recipe, voice: Voice) -> Rows:
    """Load the rows, find out what they are about, and number their classes as the teacher does."""
    options, source = recipe.data, (recipe.models.teacher or [""])[0]
    config = read_config(source, "teacher")
    splits = flat_translations(load_splits(options))
    features = splits.train.features
    kind = find_task(config, features, options)
    columns = task_columns(kind, features, options)
    splits, dropped = chosen_rows(splits, columns)
    classes = None
    if kind.classifies:
        assert columns.label is not None
        classes = find_classes(splits, columns.label, tokens=kind.labels_tokens, regression=options.regression)
        if recipe.models.teacher_epochs:
            _check_kind(classes, options)
        elif has_head(config, kind):
            classes = as_by_teacher(classes, class_names(config), config.num_labels, options.class_names)
            _check_agreement(recipe.models.teacher or [], config)
    counts = f"{len(splits.train):,} to train on, {len(splits.test):,} of {splits.test_name} for the table"
    if splits.validation is not splits.test:
        counts += f", {len(splits.validation):,} to evaluate on while training"
    voice("data", f"{options.dataset}: {counts}")
    about = f"{kind.name}: {columns}" + (f", {classes}" if classes is not None else "")
    voice("", about + (f"; {dropped:,} rows without an input or a label were left out" if dropped else ""))
    return Rows(kind, columns, classes, splits)


def _check_kind(classes: Classes, options: DataOptions) -> None:
    """Refuse whole floats where nothing tells whether they are classes."""
    if classes.scores and options.regression is None:
        raise ConfigurationError(
            "Whether the labels are classes or numbers to predict is not known",
            received=f"whole floats: {', '.join(classes.names[:5])}",
            expected="regression: true, or regression: false",
            todo="set regression",
        )


def _check_agreement(sources: Sequence[str], config: Any) -> None:
    """Refuse several teachers whose outputs are not the same classes in the same order."""
    first = class_names(config) or [str(config.num_labels)]
    for source in sources[1:]:
        other = read_config(source, "teacher")
        names = class_names(other) or [str(other.num_labels)]
        if [name.lower() for name in names] != [name.lower() for name in first]:
            raise ConfigurationError(
                "The teachers number their classes differently",
                received=f"{', '.join(names)} ({source}) and {', '.join(first)} ({sources[0]})",
                expected="the same classes in the same order",
                todo="give them the same id2label, or leave one of them out",
            )
