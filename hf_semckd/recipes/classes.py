"""The classes of the data, and the numbers that the teacher has for them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from datasets import ClassLabel, Value
from datasets.features import LargeList, List

from ..errors import ConfigurationError, InputError
from .sources import Splits

Kind = Literal["single", "multi", "regression"]
MOST_CLASSES = 5_000


@dataclass(frozen=True)
class Classes:
    """What a column of labels holds.

    Attributes:
        names: In the order of the model's outputs; empty in regression.
        kind: One class for each sample (or token), any number of them, or a number.
        values: What stands in the column for each name: the same texts, or numbers.
        numbered: Whether the order is told by the data, and not merely that of the alphabet.
        scores: Whether they are whole floats, which may be numbers to predict as well as classes.
    """

    names: tuple[str, ...]
    kind: Kind
    values: tuple[Any, ...] = ()
    numbered: bool = True
    scores: bool = False

    def encode(self, value: Any) -> Any:
        """Return a cell of the column as a label: a number, or with several classes 0.0 or 1.0 for each."""
        if self.kind == "regression":
            return float(value)
        if self.kind == "single":
            return self._place(value)
        found = {self._place(entry) for entry in value}
        return [float(place in found) for place in range(len(self.names))]

    def _place(self, value: Any) -> int:
        try:
            return self._places[value]
        except (KeyError, TypeError):
            raise InputError(
                "A label is none of the classes",
                received=repr(value),
                expected=str(self),
                todo="correct the column of labels, which is to hold the same in all splits",
            ) from None

    @cached_property
    def _places(self) -> dict[Any, int]:
        return {value: place for place, value in enumerate(self.values)}

    @property
    def outputs(self) -> int:
        """Number of outputs of a model for these labels."""
        return max(len(self.names), 1)

    def head(self) -> dict[str, Any]:
        """Return the settings of a configuration for a model of these labels."""
        if self.kind == "regression":
            return {"num_labels": 1, "problem_type": "regression"}
        problem = "multi_label_classification" if self.kind == "multi" else "single_label_classification"
        names = dict(enumerate(self.names))
        return {"id2label": names, "label2id": {n: i for i, n in names.items()}, "problem_type": problem}

    def __str__(self) -> str:
        if self.kind == "regression":
            return "a number"
        shown = ", ".join(self.names[:4]) + (", ..." if len(self.names) > 4 else "")
        return f"{len(self.names)} classes ({shown})" + (", any number of them" if self.kind == "multi" else "")


def find_classes(splits: Splits, column: str, *, tokens: bool = False, regression: bool | None = None) -> Classes:
    """Return what a column of labels holds, over all splits; with `tokens`, that of lists with one for each token.

    `regression` tells whether they are numbers to predict; None: where floats are not whole.
    """
    feature = splits.train.features[column]
    inner, listed = feature, isinstance(feature, (List, LargeList))
    if listed:
        inner = feature.feature
    kind: Kind = "multi" if listed and not tokens else "single"
    if isinstance(inner, ClassLabel):
        return _at_least_two(
            _by_number(inner.names, range(inner.num_classes), kind, numbered=not splits.by_folder), column
        )
    if not isinstance(inner, Value):
        raise _no_classes(f"{feature} in {column!r}")
    found: set[Any] = set()
    for split in dict.fromkeys((splits.train, splits.validation, splits.test)):
        if kind == "multi":
            _check_sets(column, split[column])
        found |= set(itertools.chain.from_iterable(split[column])) if listed else set(split.unique(column))
    numbers = all(isinstance(value, (bool, int, float)) for value in found)
    whole = numbers and all(float(value).is_integer() for value in found)
    if kind == "single" and numbers and (regression or not whole) and regression is not False:
        return Classes((), "regression")
    if regression or (numbers and not whole):
        raise _no_classes(
            f"{'other values than numbers' if regression else 'numbers that are not whole'} in {column!r}"
        )
    if len(found) > MOST_CLASSES or not found:
        raise _no_classes(f"{len(found)} different values in {column!r}")
    if not numbers and len({type(value) for value in found}) > 1:
        raise _no_classes(f"texts and numbers in {column!r}")
    made = _sorted_classes(found, kind, whole=whole)
    scores = kind == "single" and not tokens and all(isinstance(value, float) for value in found)
    return _at_least_two(replace(made, scores=scores), column)


def _at_least_two(classes: Classes, column: str) -> Classes:
    if classes.kind == "single" and len(classes.names) < 2:
        raise _no_classes(f"one class in {column!r}: {', '.join(classes.names)}")
    return classes


def _by_number(names: Sequence[str], values: Sequence[Any], kind: Kind, *, numbered: bool) -> Classes:
    """Return classes of these names; in the order of their numbers where names are numbers and order says nothing."""
    pairs = list(zip(names, values, strict=True))
    if not numbered and all(name.isdigit() for name in names):
        pairs.sort(key=lambda pair: int(pair[0]))
    return Classes(tuple(name for name, _ in pairs), kind, tuple(value for _, value in pairs), numbered=numbered)


def _sorted_classes(found: set[Any], kind: Kind, *, whole: bool) -> Classes:
    values = tuple(sorted(found))
    if whole and values[0] == 0 and values[-1] < MOST_CLASSES:
        # Numbers are those of the classes, also where some of them do not occur.
        values = tuple(range(int(values[-1]) + 1))
        return Classes(tuple(map(str, values)), kind, values)
    return _by_number([str(int(v)) if whole else str(v) for v in values], values, kind, numbered=False)


def as_by_teacher(classes: Classes, names: Sequence[str] | None, count: int, given: Sequence[str] | None) -> Classes:
    """Return the classes in the order of a fine-tuned teacher's outputs.

    Args:
        names: The teacher's names, None where it has none of its own.
        count: Number of its outputs.
        given: The data's names in the teacher's order, from the recipe.

    Raises `ConfigurationError` where the order cannot be known: a wrong one would be learned without any sign.
    """
    if classes.kind == "regression" or (count == 1 and classes.kind == "single"):
        if count == 1 and all(isinstance(value, (bool, int, float)) for value in classes.values):
            return Classes((), "regression")
        raise _unmatched(classes, names, count)
    own = [name.lower() for name in classes.names]
    if given is not None:
        order = [name.lower() for name in given]
        if set(own) <= set(order) and len(order) == count:
            return _ordered(classes, order, tuple(given))
        raise _unmatched(classes, given, count)
    theirs = None if names is None else [name.lower() for name in names]
    if theirs is not None and set(own) <= set(theirs):
        return _ordered(classes, theirs, tuple(names or ()))
    if not classes.numbered and all(name.isdigit() for name in own) and max(map(int, own)) < count:
        # A text or a folder that is named by a number means the output of that number.
        places = {int(name): value for name, value in zip(own, classes.values, strict=True)}
        known = names if names is not None else [str(place) for place in range(count)]
        return replace(classes, names=tuple(known), values=tuple(places.get(n, _Absent()) for n in range(count)))
    # Numbers, and the classes of a dataset that numbers them, mean the outputs of the same number.
    unnamed = theirs is None or all(name.isdigit() for name in own)
    if classes.numbered and unnamed and len(own) <= count:
        named = tuple(names) if names is not None else classes.names
        padded = (*named, *(f"LABEL_{place}" for place in range(len(named), count)))
        return replace(classes, names=padded[:count], values=_padded(classes.values, count))
    raise _unmatched(classes, names, count)


def _no_classes(received: str) -> InputError:
    return InputError(
        "The column of labels does not hold classes",
        received=received,
        expected=f"from 1 to {MOST_CLASSES} classes, or numbers",
        todo="set label_column to the column of the labels",
    )


def _check_sets(column: str, cells: Iterable[Sequence[Any]]) -> None:
    wrong = next((cell for cell in cells if len(set(cell)) < len(cell)), None)
    if wrong is not None:
        raise InputError(
            "A list of labels names a class twice",
            received=f"{column}: {wrong}",
            expected="the classes of a row, each once: [1, 4], and not 0 or 1 for every class",
            todo="write the numbers of the classes in place of zeros and ones",
        )


def _ordered(classes: Classes, order: Sequence[str], names: tuple[str, ...]) -> Classes:
    places = {name.lower(): value for name, value in zip(classes.names, classes.values, strict=True)}
    # An output without a class in the data gets a value that stands in no row.
    return replace(classes, names=names, values=tuple(places.get(name, _Absent()) for name in order))


class _Absent:
    """The value of a class that the data do not have."""


def _padded(values: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    return (*values, *(_Absent() for _ in range(len(values), count)))


def _unmatched(classes: Classes, names: Sequence[str] | None, count: int) -> ConfigurationError:
    theirs = f"{count} outputs without names" if names is None else ", ".join(names)
    return ConfigurationError(
        "Which class of the data is which output of the teacher is not known",
        received=f"data: {classes}; teacher: {theirs}",
        expected="the same names, in any order, or as many numbered classes",
        todo="set class_names to the data's classes, in the order of the teacher's outputs",
    )
