"""A few samples of a dataset, and batches made of them."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets import IterableDataset as StreamedDataset
from torch.utils.data import IterableDataset

from .columns import LABEL_COLUMNS

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


def label_range(dataset: Any) -> tuple[int, int] | None:
    """Return the least and the greatest label of a `datasets.Dataset`, from its table; None where that is not known.

    Of a selection of rows, lists of labels are not looked through.
    """
    labels = _column(dataset, LABEL_COLUMNS)
    if labels is None:
        return None
    lists = pa.types.is_list(labels.type) or pa.types.is_large_list(labels.type)
    if dataset._indices is not None:
        if lists:
            return None
        labels = labels.take(dataset._indices.column(0))
    while pa.types.is_list(labels.type) or pa.types.is_large_list(labels.type):
        labels = pc.list_flatten(labels)
    if not pa.types.is_integer(labels.type) or len(labels) == labels.null_count:
        return None
    bounds = pc.min_max(labels).as_py()
    return bounds["min"], bounds["max"]


def longest_sample(dataset: Any) -> int | None:
    """Return the index of the sample with the most tokens in a `datasets.Dataset`; None where that is not known."""
    tokens = _column(dataset, ("input_ids",))
    if tokens is None or not (pa.types.is_list(tokens.type) or pa.types.is_large_list(tokens.type)):
        return None
    lengths = pc.list_value_length(tokens)
    if dataset._indices is not None:
        lengths = lengths.take(dataset._indices.column(0))
    return pc.index(lengths, pc.max(lengths)).as_py() if len(lengths) else None


def _column(dataset: Any, names: Sequence[str]) -> pa.ChunkedArray | None:
    """Return the first of some columns that a `datasets.Dataset` has, of all rows of its table; nothing is copied."""
    # What a transform makes of the rows when they are read, the table does not tell.
    plain = isinstance(dataset, Dataset) and dataset.format["type"] != "custom"
    known = dataset.column_names if plain else ()
    return next((dataset.data.column(name) for name in names if name in known), None)


def is_map_style(dataset: Any) -> bool:
    """Whether samples have indices, and can be counted."""
    iterable = isinstance(dataset, (IterableDataset, StreamedDataset))
    return not iterable and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
