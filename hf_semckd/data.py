"""Batches for a teacher and a student that read the same samples in different ways."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

# Columns with this prefix are the teacher's own inputs, under the name that follows it.
TEACHER_PREFIX = "teacher_"


def teacher_entries(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a batch holds for the teacher alone, without the prefix; the batch itself where that is nothing."""
    own = {key.removeprefix(TEACHER_PREFIX): value for key, value in batch.items() if key.startswith(TEACHER_PREFIX)}
    return own or batch


class TeacherStudentCollator:
    """Collates a sample's `teacher_*` columns with the teacher's collator and the others with the student's.

    Needed where both tokenize differently: a tokenizer pads the columns that it knows, and no others.

    Args:
        student_collator: Such as `DataCollatorWithPadding(student_tokenizer)`.
        teacher_collator: Such as `DataCollatorWithPadding(teacher_tokenizer)`.

    Example:
        >>> collator = TeacherStudentCollator(
        ...     DataCollatorWithPadding(student_tokenizer), DataCollatorWithPadding(teacher_tokenizer)
        ... )  # doctest: +SKIP
        >>> collator([{"input_ids": [1, 2], "teacher_input_ids": [7], "labels": 0}])  # doctest: +SKIP
    """

    def __init__(
        self,
        student_collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
        teacher_collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    ):
        self.student_collator = student_collator
        self.teacher_collator = teacher_collator

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the student's batch, with the teacher's beside it under `teacher_*`."""
        own: list[dict[str, Any]] = [{} for _ in samples]
        theirs: list[dict[str, Any]] = [{} for _ in samples]
        for index, sample in enumerate(samples):
            for key, value in sample.items():
                target = theirs if key.startswith(TEACHER_PREFIX) else own
                target[index][key.removeprefix(TEACHER_PREFIX)] = value
        batch = dict(self.student_collator(own))
        # In evaluation the teacher's columns may have been left out: it does not take part.
        teacher = self.teacher_collator(theirs) if all(theirs) else {}
        return {**batch, **{f"{TEACHER_PREFIX}{key}": value for key, value in teacher.items()}}


class RepeatableViews(Dataset[Any]):
    """A dataset whose random transform has a few outcomes a sample, each the same whenever it comes.

    Random augmentation never shows a teacher the same input twice, so that nothing can be cached. With this, every
    sample has `views` versions, of which a random one is taken each time: a cache holds them all after some epochs.

    Args:
        dataset: Map-style dataset.
        transform: Turns one of its samples into a sample of this dataset; draws from the generators of `random`,
            `numpy` or `torch`.
        views: Versions of each sample, >= 1.
        seed: Of the versions.

    Example:
        >>> RepeatableViews(images, lambda row: {**row, "pixel_values": crop(row["pixel_values"])})  # doctest: +SKIP
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Any], views: int = 4, seed: int = 0):
        self.dataset = dataset
        self.transform = transform
        self.views = views
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return a random one of the sample's versions."""
        return self.version(index, int(torch.randint(self.views, ())))

    def version(self, index: int, view: int) -> Any:
        """Return a certain version of a sample, the same whenever it is asked for."""
        # An own seed for each version: neighbours must not share their crops.
        seed = int(np.random.SeedSequence([self.seed, index, view]).generate_state(1)[0])
        with untouched_random_state(seed):
            return self.transform(self.dataset[index])


class _AllVersions(Dataset[Any]):
    def __init__(self, views: RepeatableViews):
        self.of = views

    def __len__(self) -> int:
        return len(self.of) * self.of.views

    def __getitem__(self, index: int) -> Any:
        return self.of.version(*divmod(index, self.of.views))


def all_versions(dataset: Any) -> Any:
    """Return a dataset with every version of every sample of `RepeatableViews`; any other dataset as it is."""
    return _AllVersions(dataset) if isinstance(dataset, RepeatableViews) else dataset


@contextmanager
def untouched_random_state(seed: int) -> Iterator[None]:
    """Seed all generators for a moment and restore them: probing and building leave training's randomness alone."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Not in a worker process, where touching a GPU is an error, and not where none was used yet.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
