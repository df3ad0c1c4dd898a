"""From rows to samples: the columns of the task, without rows that lack something, read by each model's processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Audio, ClassLabel, Dataset, Image, Translation

from ..data.columns import TEACHER_PREFIX, TeacherStudentCollator
from ..errors import InputError, SemCKDError
from .processors import read_alike
from .sources import Splits
from .tasks.base import Columns, Task

# Tasks whose samples depend on the tokenizer: with two of them the models would not see the same ones.
NEEDS_ONE_TOKENIZER = ("question-answering", "text-generation", "text2text-generation")


@dataclass(frozen=True)
class Samples:
    """Splits that are ready for a trainer, what makes batches of them, and the longest one (tokens, or seconds)."""

    splits: Splits
    collator: Callable[[list[Any]], Mapping[str, Any]]
    processor: Any
    length: int


def chosen_rows(splits: Splits, columns: Columns) -> tuple[Splits, int]:
    """Return the splits with these columns and the rows that lack none of them, and how many rows were left out."""
    label = columns.label
    dropped = 0

    def change(split: Dataset) -> Dataset:
        nonlocal dropped
        if missing := [name for name in columns.all if name not in split.column_names]:
            raise InputError(
                "A split lacks a column",
                received=f"{', '.join(missing)} is not among {', '.join(split.column_names)}",
                expected=f"the columns {columns}",
                todo="name another eval_split or test_split",
            )
        kept = split.select_columns(list(dict.fromkeys(columns.all)))
        # Sounds are read by soundfile: decoding by `datasets` needs FFmpeg.
        kept = _undecoded(kept, Audio)
        # Pictures are opened one by one, so that a broken one can be named.
        kept = _undecoded(kept, Image)
        filled = _without_gaps(kept, label)
        dropped += len(kept) - len(filled)
        kept = filled
        if not len(kept):
            raise InputError(
                "No row of a split can be used",
                received=f"{len(split)} rows that lack one of {', '.join(columns.all)}",
                expected="labeled rows",
                todo="check the split, and the columns",
            )
        return kept

    return splits.map(change), dropped


def flat_translations(splits: Splits) -> Splits:
    """Return the splits with a column for each language in place of a column of translations."""
    nested = any(isinstance(feature, Translation) for feature in splits.train.features.values())
    return splits.map(lambda split: split.flatten()) if nested else splits


def make_samples(task: Task, splits: Splits, model: Any, processor: Any, teachers: Any) -> Samples:
    """Return the samples for a model and its processor, and beside them those for the teacher's where both differ.

    Raises `InputError` where a split gives no samples, or both would get other ones.
    """
    readers: dict[str, Any] = {"": processor}
    collator = task.collator(processor, model)
    if not read_alike(processor, teachers):
        if task.name in NEEDS_ONE_TOKENIZER:
            raise InputError(
                f"Teacher and student need one tokenizer for {task.name}",
                received="two tokenizers that read a text differently",
                expected="one vocabulary",
                todo="take a student of the teacher's family, or cut it out of the teacher: student: {num_layers: 4}",
            )
        readers[TEACHER_PREFIX] = teachers
        collator = TeacherStudentCollator(collator, task.collator(teachers, model))

    def encode(rows: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for prefix, reader in readers.items():
            made = _encoded(task, reader, rows)
            found |= {f"{prefix}{name}": values for name, values in made.items() if not prefix or name != "labels"}
        return found

    def change(split: Dataset) -> Dataset:
        if task.lazy:
            return split.with_transform(encode)
        made = split.map(encode, batched=True, remove_columns=split.column_names, desc="Preparing")
        if not len(made):
            raise InputError(
                "The texts of a split are too short for one sample",
                received=f"{len(split)} rows, fewer than {task.length} tokens together",
                expected="at least one piece of max_length tokens",
                todo="lower max_length",
            )
        return made

    return Samples(splits.map(change), collator, processor, task.length)


def _encoded(task: Task, reader: Any, rows: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return the samples of rows; whatever the reader raises becomes an `InputError` that shows a row."""
    try:
        return task.encode(reader, rows)
    except SemCKDError:
        raise
    except Exception as error:  # of any tokenizer or processor
        row = {name: " ".join(str(cells[0]).split())[:60] for name, cells in rows.items() if len(cells)}
        raise InputError(
            f"Rows cannot be read for {task.name}",
            received=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}; the first of them is {row}",
            expected=f"columns {task.columns} of the kind that the task reads",
            todo="correct the rows, or set input_columns and label_column",
        ) from error


def _undecoded(split: Dataset, kind: type) -> Dataset:
    """Return a split whose columns of sounds or images are files, which are not opened."""
    for name in [name for name, feature in split.features.items() if isinstance(feature, kind)]:
        split = split.cast_column(name, kind(decode=False))
    return split


def _without_gaps(split: Dataset, label: str | None) -> Dataset:
    """Return the rows that lack nothing: no cell is missing, no input is blank, no class is -1, a hidden one."""
    hidden = -1 if label is not None and isinstance(split.features[label], ClassLabel) else None
    blank: tuple[Any, ...] = ([], "", None)

    def whole(*row: Any) -> bool:
        cells = dict(zip(checked, row, strict=True))
        target = cells.pop(label, 0)
        inputs = (cell.strip() if isinstance(cell, str) else cell for cell in cells.values())
        return target not in (None, hidden) and not any(cell in blank for cell in inputs)

    # Pictures and sounds are not all read for this: the table knows whether one is missing.
    files = [name for name, feature in split.features.items() if isinstance(feature, (Audio, Image))]
    checked = [name for name in split.column_names if name not in files or split.data.column(name).null_count]
    return split.filter(whole, input_columns=checked) if checked else split
