"""Making batches of samples, and refusing those that no training step can be taken on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .columns import IGNORED, IGNORED_PIXEL, LABEL_COLUMNS, TEACHER_PREFIX

TRUNCATE = "tokenize with truncation=True, max_length=..."
LEAVE_OUT = "correct such samples, or leave them out of the data set"
MAKE_WHOLE = "make labels int64, such as torch.tensor(labels, dtype=torch.int64), in the data set or the collator"
LOAD_CLASSES = "load the student with num_labels of the data set, or map the labels to 0, 1, 2, ..."

# What a detector learns of a picture.
OBJECTS = ("class_labels", "boxes")


@dataclass(frozen=True)
class BatchCheck:
    """What every batch must be, checked where the collator makes it: no device is waited for.

    Attributes:
        columns: Those that a model takes.
        labels: Columns that must hold labels; empty where nobody reads them.
        limits: What the whole numbers in a column stay below: the classes of labels, the entries of a table.
        lengths: The most tokens that a column may have.
        ignored: Labels that the student's loss ignores, or may.
        ignored_field: The field of the student's configuration that says so, where there is one.
        whole: Whether the loss is known to need class numbers in int64.
        needs_labels: Whether there must be labels; where not, all samples have them or none.
    """

    columns: frozenset[str] = frozenset()
    labels: tuple[str, ...] = ()
    limits: Mapping[str, int] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)
    ignored: tuple[int, ...] = (IGNORED,)
    ignored_field: str | None = None
    whole: bool = True
    needs_labels: bool = True

    def __call__(self, batch: Any, samples: Sequence[Any] = ()) -> None:
        """Raise `InputError`, which names column and row, for a batch that would break the step."""
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)} if _is_map(batch) else {}
        if not any(value.numel() for value in tensors.values()):
            raise InputError(
                "The data collator made an empty batch",
                received=f"{type(batch).__name__} without a value, of {len(samples)} samples",
                expected="a mapping with a tensor of at least one row",
                todo="let the data set or the collator leave no batch without samples",
            )
        self._check_columns(batch, samples)
        for name, value in tensors.items():
            if name in self.columns or name in self.labels:
                self.check_values(name, value)
        for name in self.labels:
            if name in self.limits and isinstance(batch.get(name), (list, tuple)):
                self._check_objects(name, batch[name])

    def _check_columns(self, batch: Mapping[str, Any], samples: Sequence[Any]) -> None:
        """Refuse a column that some samples lack, which a collator may have left out without a word."""
        wanted = [name for name in sorted(self.columns) if name not in batch]
        lacking = [name for name in self.labels if name not in batch]
        if lacking:
            wanted += [*lacking, *LABEL_COLUMNS]
        gap = find_gap(samples, wanted)
        if gap is not None or (lacking and self.needs_labels):
            raise InputError(
                "The data collator left out a column that some samples lack" if gap else "A batch has no labels",
                received=gap or f"a batch of the columns {', '.join(map(repr, batch))}",
                expected="the same columns in every sample, and no None",
                todo="fill the gap, or leave such samples out of the data set",
            )

    def check_values(self, name: str, value: Tensor, place: str | None = None) -> None:
        """Raise `InputError` for the first value of a column that no model or loss can take.

        `place` says where the values are; None for a batch, whose row is named.
        """
        limit, longest = self.limits.get(name), self.lengths.get(name)
        if longest is not None and value.dim() == 2 and value.shape[1] > longest:
            received, expected = f"{value.shape[1]} tokens", f"at most {longest}"
            raise _refusal("A batch is longer than a model's positions", name, received, expected, TRUNCATE)
        # A mask may hold infinity. The sum is finite where all are, and many times as fast as looking at each.
        if value.is_floating_point() and "mask" not in name and not bool(value.sum().isfinite()):
            if not bool(value.isfinite().all()):
                received = f"NaN or infinity in row {_row(~value.isfinite())} of the batch"
                raise _refusal("A batch has values that are not finite", name, received, "finite values", LEAVE_OUT)
        if limit is None or (value.dim() > 2 and value.is_floating_point()):
            return
        if name in self.labels:
            self._check_classes(name, value, limit, place)
        elif not value.is_floating_point():
            _check_entries(name, value, limit)

    def _check_classes(self, name: str, value: Tensor, limit: int, place: str | None) -> None:
        """Refuse labels that are no class of the student's, nor the one that its loss ignores."""
        if not self.whole and value.is_floating_point():
            return
        if self.whole and value.dtype != torch.int64:
            received, expected = f"{value.dtype}".removeprefix("torch."), "int64: one class number for each item"
            raise _refusal("The labels are class numbers of another type", name, received, expected, MAKE_WHOLE)
        bad = (value < 0) | (value >= limit)
        for ignored in self.ignored:
            bad &= value != ignored
        if not bool(bad.any()):
            return
        first, known = int(value[bad][0]), f"0 to {limit - 1}"
        received = f"{first} in {place or f'row {_row(bad)} of the batch'}"
        instead = " or ".join(map(str, self.ignored))
        known += f", or {instead} for what does not count" if instead else ""
        if first == IGNORED or (first == IGNORED_PIXEL and value.dim() > 2):
            todo = f"replace {first} by {instead}" if instead else LEAVE_OUT
            if self.ignored_field is not None:
                todo += f", or set student.config.{self.ignored_field}={first} and make the trainer anew"
            raise _refusal("There are labels that the student's loss does not ignore", name, received, known, todo)
        raise _refusal(f"There are labels outside the student's {limit} classes", name, received, known, LOAD_CLASSES)

    def _check_objects(self, name: str, entries: Sequence[Any]) -> None:
        """Refuse objects of a picture (`class_labels` and `boxes`, one entry a picture) that no detector can learn."""
        for row, entry in enumerate(entries):
            fault = _fault_of_objects(entry, self.limits[name])
            if fault is not None:
                raise _refusal(
                    "There are objects that a detector cannot learn from",
                    name,
                    f"{fault} in row {row} of the batch",
                    f"`class_labels` (n), int64 from 0 to {self.limits[name] - 1}, and `boxes` (n, 4): "
                    "x and y of their centers, width and height",
                    LEAVE_OUT,
                )


def _check_entries(name: str, value: Tensor, limit: int) -> None:
    """Refuse numbers that are no row of the table that reads them."""
    bad = (value < 0) | (value >= limit)
    if not bool(bad.any()):
        return
    what, todo = f"There are token ids outside a vocabulary of {limit} entries", "tokenize with the model's tokenizer"
    if name.endswith("token_type_ids"):
        what = f"There are token types outside a table of {limit} entries"
        todo = "tokenize with return_token_type_ids=False, or load a model with a larger type_vocab_size"
    raise _refusal(what, name, f"{int(value[bad][0])} in row {_row(bad)} of the batch", f"0 to {limit - 1}", todo)


def _fault_of_objects(entry: Any, classes: int) -> str | None:
    """Return what is wrong with the objects of one picture; None where nothing is."""
    if not _is_map(entry):
        return repr(entry)
    found = [entry.get(name) for name in OBJECTS]
    for name, value in zip(OBJECTS, found, strict=True):
        if not isinstance(value, Tensor):
            return f"no tensor `{name}`"
    labels, boxes = found
    if labels.dim() != 1 or boxes.shape != (len(labels), 4):
        return f"class_labels {tuple(labels.shape)} and boxes {tuple(boxes.shape)}"
    if labels.dtype != torch.int64 or not boxes.is_floating_point():
        return f"class_labels of {labels.dtype} and boxes of {boxes.dtype}".replace("torch.", "")
    bad = (labels < 0) | (labels >= classes)
    if bool(bad.any()):
        return f"class {int(labels[bad][0])}"
    if not bool(boxes.isfinite().all()):
        return "a box with NaN or infinity"
    return "a box of negative size" if bool((boxes[:, 2:] < 0).any()) else None


def _refusal(what: str, name: str, received: str, expected: str, todo: str) -> InputError:
    return InputError(what, received=f"`{name}`: {received}", expected=expected, todo=todo)


@dataclass(eq=False)
class CheckedCollator:
    """A collator whose batches are checked, and whose failures are told with the column and row that caused them."""

    collator: Callable[[Any], Any]
    check: BatchCheck

    def __call__(self, samples: Any) -> Any:
        """Return the batch."""
        batch = collate(self.collator, samples)
        self.check(batch, samples)
        return batch


def collate(collator: Any, samples: list[Any]) -> Mapping[str, Any]:
    """Return the samples as a batch. Raises `InputError` when the collator cannot make one."""
    if isinstance(samples, list) and not samples:
        raise InputError(
            "There is no sample to learn from",
            received="0 samples: the stream ended before its first one",
            expected="at least 1",
            todo="check how the stream is made: its filters, how many samples it skips, whether it was read before",
        )
    try:
        return collator(samples)
    except (ValueError, TypeError, KeyError, RuntimeError, IndexError, AttributeError) as error:
        columns = list(samples[0]) if samples and isinstance(samples[0], Mapping) else []
        paired = any(str(name).startswith(TEACHER_PREFIX) for name in columns)
        why = find_gap(samples) or _find_lengths(samples)
        raise InputError(
            "The data collator cannot make a batch of the samples",
            received=f"columns {', '.join(map(repr, columns)) or 'of unknown names'}"
            f"{f'; {why}' if why else ''}; the collator said: {error!r}",
            expected="samples that it can stack or pad",
            todo="use hf_semckd.data.TeacherStudentCollator: each tokenizer then pads its own columns"
            if paired
            else "pass a data_collator that fits the samples, such as DataCollatorWithPadding(tokenizer)",
        ) from error


def find_gap(samples: Sequence[Any], columns: Sequence[str] | None = None) -> str | None:
    """Say which sample lacks one of the columns (None: of all that any has), or has None there; None if none does."""
    if not samples or not all(map(_is_map, samples)):
        return None
    known = list(dict.fromkeys(name for sample in samples for name in sample))
    for name in known if columns is None else [name for name in known if name in columns]:
        for row, sample in enumerate(samples):
            if name not in sample:
                return f"row {row} of the batch has no `{name}`"
            value = sample[name]
            if value is None or (isinstance(value, (list, tuple)) and None in value):
                return f"`{name}` is None, or holds None, in row {row} of the batch"
    return None


def _find_lengths(samples: Sequence[Any]) -> str | None:
    """Return in words the first column whose values differ in shape."""
    if not samples or not all(map(_is_map, samples)):
        return None
    for name in samples[0]:
        shapes = [_shape(sample[name]) for sample in samples]
        other = next((row for row, shape in enumerate(shapes) if shape != shapes[0]), None)
        if other is not None:
            return f"`{name}` has the shape {shapes[0]} in row 0 of the batch and {shapes[other]} in row {other}"
    return None


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if hasattr(value, "shape") else (len(value),) if isinstance(value, (list, tuple)) else ()


def _row(bad: Tensor) -> int:
    return int(bad.nonzero()[0, 0]) if bad.dim() else 0


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)
