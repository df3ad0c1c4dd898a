"""A few samples of a dataset, and batches made of them."""

from collections.abc import Mapping
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets import IterableDataset as StreamedDataset
from torch.utils.data import IterableDataset

from ..errors import InputError
from .columns import LABEL_COLUMNS, TEACHER_PREFIX

FIRST_SAMPLES = 2


def column_names(dataset: Any) -> list[str]:
    """Return the names of a dataset's columns; one that does not tell them gives a sample."""
    names = getattr(dataset, "column_names", None)
    if names or dataset is None:
        return list(names or ())
    sample = next(iter(first_samples(dataset)), None)
    return list(sample) if isinstance(sample, Mapping) else []


def spread_samples(dataset: Any, count: int) -> list[Any]:
    """Return a few samples of a map-style dataset, from its beginning to its end."""
    taken = min(count, len(dataset))
    return [dataset[index * len(dataset) // taken] for index in range(taken)]


def first_samples(dataset: Any) -> list[Any]:
    """Return the first samples of a map-style or iterable dataset."""
    if is_map_style(dataset):
        return [dataset[index] for index in range(min(FIRST_SAMPLES, len(dataset)))]
    return list(islice(iter(dataset), FIRST_SAMPLES))


def collate(collator: Any, samples: list[Any]) -> Mapping[str, Any]:
    """Return the samples as a batch. Raises `InputError` when the collator cannot make one."""
    try:
        return collator(samples)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        columns = list(samples[0]) if samples and isinstance(samples[0], Mapping) else []
        paired = any(str(name).startswith(TEACHER_PREFIX) for name in columns)
        raise InputError(
            "The data collator cannot make a batch of the training samples",
            received=f"columns {', '.join(map(repr, columns)) or 'of unknown names'}; the collator said: {error}",
            expected="samples that it can stack or pad",
            todo="use hf_semckd.data.TeacherStudentCollator: each tokenizer then pads its own columns"
            if paired
            else "pass a data_collator that fits the samples, such as DataCollatorWithPadding(tokenizer)",
        ) from error


def label_range(dataset: Any) -> tuple[int, int] | None:
    """Return the least and the greatest label of a `datasets.Dataset`, from its table; None where that is not known.

    A selection of rows is not looked through: its table holds the others too.
    """
    if not isinstance(dataset, Dataset) or dataset._indices is not None:
        return None
    name = next((name for name in LABEL_COLUMNS if name in dataset.column_names), None)
    if name is None:
        return None
    labels = dataset.data.column(name)
    while pa.types.is_list(labels.type) or pa.types.is_large_list(labels.type):
        labels = pc.list_flatten(labels)
    if not pa.types.is_integer(labels.type) or len(labels) == labels.null_count:
        return None
    bounds = pc.min_max(labels).as_py()
    return bounds["min"], bounds["max"]


def is_map_style(dataset: Any) -> bool:
    """Whether samples have indices, and can be counted."""
    iterable = isinstance(dataset, (IterableDataset, StreamedDataset))
    return not iterable and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
