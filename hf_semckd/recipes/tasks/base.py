"""What every task says of itself: the columns that it reads, the samples it makes, and how they become batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import ClassLabel, Features, Value
from datasets.features import LargeList, List

from ...errors import ConfigurationError, InputError
from ..classes import Classes
from ..schema import DataOptions, TaskName

LABELS = ("label", "labels", "class", "target", "category", "sentiment", "intent", "tags")
Rows = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Columns:
    """The columns that are read of a data set; `label` is None where the inputs are all there is to learn."""

    inputs: tuple[str, ...]
    label: str | None

    def __str__(self) -> str:
        return " + ".join(self.inputs) + (f" -> {self.label}" if self.label is not None else "")

    @property
    def all(self) -> tuple[str, ...]:
        """The names of all of them."""
        return self.inputs if self.label is None else (*self.inputs, self.label)


class Task(ABC):
    """Turns the rows of one task into samples for one processor.

    Attributes:
        name: On the Hub.
        heads: Ends of the names of models that do this; the first one is that of new models.
        modality: `text`, `image` or `audio`: which processor reads the inputs.
        labels_tokens: Whether labels are lists with one for each token.
        classifies: Whether the label is one of the data's classes, or several, or a number.
        lazy: Whether samples are made when they are read, since stored they would be many times as large.
    """

    name: ClassVar[TaskName]
    heads: ClassVar[tuple[str, ...]]
    modality: ClassVar[str] = "text"
    labels_tokens: ClassVar[bool] = False
    classifies: ClassVar[bool] = True
    lazy: ClassVar[bool] = False

    def __init__(self, columns: Columns, classes: Classes | None, options: DataOptions, length: int):
        self.columns, self.classes, self.options, self.length = columns, classes, options, length

    @classmethod
    @abstractmethod
    def find_columns(cls, features: Features, options: DataOptions) -> Columns | None:
        """Return the columns that such a task reads of a data set, or None where there are none."""

    @abstractmethod
    def encode(self, processor: Any, rows: Rows) -> dict[str, Any]:
        """Return the inputs and labels of some rows, as lists."""

    @abstractmethod
    def collator(self, processor: Any, model: Any) -> Callable[[list[Any]], Mapping[str, Any]]:
        """Return what makes batches of samples."""

    def labels(self, rows: Rows) -> list[Any]:
        """Return the labels of rows."""
        assert self.columns.label is not None and self.classes is not None
        return [self.classes.encode(value) for value in rows[self.columns.label]]

    def texts(self, rows: Rows, column: int = 0) -> list[str]:
        """Return the texts of an input column, the first one after the recipe's prefix."""
        prefix = self.options.prefix if column == 0 else ""
        return [prefix + text for text in rows[self.columns.inputs[column]]]


def chosen(features: Features, options: DataOptions) -> tuple[list[str] | None, str | None]:
    """Return the columns that the recipe names; `ConfigurationError` where one is not there."""
    named = [*(options.input_columns or ()), *([options.label_column] if options.label_column else ())]
    missing = [name for name in named if name not in features]
    if missing:
        raise ConfigurationError(
            "The data set does not have this column",
            received=", ".join(missing),
            expected=f"some of {', '.join(features)}",
            todo="correct input_columns and label_column",
        )
    return options.input_columns, options.label_column


def columns_of(features: Features, kind: Callable[[Any], bool]) -> list[str]:
    """Return the names of the columns of a kind."""
    return [name for name, feature in features.items() if kind(feature)]


def label_of(features: Features) -> str | None:
    """Return the one column of classes, or else the first with a usual name."""
    classes = columns_of(features, lambda entry: isinstance(entry, ClassLabel))
    return classes[0] if len(classes) == 1 else first_named(list(features), LABELS)


def media_columns(features: Features, options: DataOptions, kind: type) -> Columns | None:
    """Return the first column of images or sounds, and that of their classes."""
    inputs, label = chosen(features, options)
    found = [name for name in inputs or features if isinstance(features[name], kind)]
    label = label or label_of(features)
    return Columns((found[0],), label) if found and label is not None else None


def require_offsets(tokenizer: Any, tells: str) -> None:
    """Refuse a tokenizer that does not tell where its tokens come from, as slow ones do not."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"This tokenizer does not tell {tells}",
            received=type(tokenizer).__name__,
            expected="a fast tokenizer (tokenizer.json)",
            todo="use models with a fast tokenizer",
        )


def is_text(feature: Any) -> bool:
    """Whether a column holds texts."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def is_list(feature: Any) -> bool:
    """Whether a column holds lists."""
    return isinstance(feature, (List, LargeList))


def first_named(candidates: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the first of some names among the candidates, whatever their case."""
    known = {candidate.lower(): candidate for candidate in reversed(candidates)}
    return next((known[name] for name in names if name in known), None)
