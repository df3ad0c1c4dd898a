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
LOAD_CLASSES = "load the student with num_labels of the data set, or map the labels to 0, 1, 2, ..."


@dataclass(frozen=True)
class BatchCheck:
    """What every training batch must be, checked where the collator makes it: no device is waited for.

    Attributes:
        columns: Those that a model takes.
        labels: Columns of which one must hold labels; empty where none are needed.
        limits: What the whole numbers in a column stay below: the classes of labels, the entries of a vocabulary.
        lengths: The most tokens that a column may have.
    """

    columns: frozenset[str] = frozenset()
    labels: tuple[str, ...] = ()
    limits: Mapping[str, int] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)

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

    def _check_columns(self, batch: Mapping[str, Any], samples: Sequence[Any]) -> None:
        """Refuse a column that some samples lack, which a collator may have left out without a word."""
        wanted = [name for name in sorted(self.columns) if name not in batch]
        if self.labels and not any(name in batch for name in self.labels):
            wanted += [*self.labels, *LABEL_COLUMNS]
        gap = find_gap(samples, wanted)
        if gap is not None or set(wanted) & {*self.labels}:
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
        if value.is_floating_point():
            # A mask may hold infinity. The sum is finite where all are, and many times as fast as looking at each.
            if "mask" in name or bool(value.sum().isfinite()) or bool(value.isfinite().all()):
                return
            received = f"NaN or infinity in row {_row(~value.isfinite())} of the batch"
            raise _refusal("A batch has values that are not finite", name, received, "finite values", LEAVE_OUT)
        if limit is None or value.dtype not in (torch.int64, torch.int32):
            return
        bad = (value < 0) | (value >= limit)
        if name in self.labels:
            bad &= value != IGNORED
            # Of pictures alone: a class may be 255 elsewhere.
            bad &= (value != IGNORED_PIXEL) | (value.dim() < 3)
        if bool(bad.any()):
            received, expected = (
                f"{int(value[bad][0])} in {place or f'row {_row(bad)} of the batch'}",
                f"0 to {limit - 1}",
            )
            if name in self.labels:
                what = f"There are labels outside the student's {limit} classes"
                expected += f", or {IGNORED} for positions that do not count"
                raise _refusal(what, name, received, expected, LOAD_CLASSES)
            todo = "tokenize with the tokenizer of the model"
            raise _refusal(
                f"There are token ids outside a vocabulary of {limit} entries", name, received, expected, todo
            )


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
    try:
        return collator(samples)
    except (ValueError, TypeError, KeyError, RuntimeError, IndexError, AttributeError) as error:
        columns = list(samples[0]) if samples and isinstance(samples[0], Mapping) else []
        paired = any(str(name).startswith(TEACHER_PREFIX) for name in columns)
        why = find_gap(samples) or _find_lengths(samples)
        raise InputError(
            "The data collator cannot make a batch of the training samples",
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
