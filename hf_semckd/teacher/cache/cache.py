"""Teacher outputs on disk, keyed by what the teacher was given, so that no epoch and no run computes them twice."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.columns import CACHED, teacher_entries
from ..outputs import TeacherOutputs
from .keys import right_padded_lengths, sample_keys, token_count
from .rows import Row, check_row_count, to_batch, to_rows
from .store import TensorStore


@dataclass
class Lookup:
    """What the cache holds of a batch: each sample's key and whether it is there, and what is there as `to_batch`."""

    keys: list[bytes]
    present: list[bool]
    values: dict[str, Tensor]


class TeacherCache:
    """Teacher outputs in a `TensorStore`, one row per sample, in a folder for one teacher and one choice of layers.

    The key is the content of the teacher's inputs after preprocessing and augmentation, without padding. A changed
    dataset, tokenizer, image size or random crop is therefore another sample, never a wrong hit.

    Args:
        folder, fingerprint: Where all caches live, and the name of this one; see `teacher_fingerprint`.
        dtype: Precision of stored features; None for that of the teacher. Logits always keep theirs.
        limit_bytes: Most that the folder may take; None for what the disk can spare.
        cut: Whether padding can be cut off; not for models that pool tokens or put others in front of them.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        fingerprint: str,
        select_inputs: Callable[[Mapping[str, Any]], dict[str, Any]],
        *,
        dtype: torch.dtype | None = None,
        limit_bytes: int | None = None,
        cut: bool = True,
    ):
        self.cut = cut
        self.store = TensorStore(Path(folder) / fingerprint, limit_bytes=limit_bytes)
        self.select_inputs = select_inputs
        self.dtype = dtype

    def keys(self, batch: Mapping[str, Any]) -> list[bytes]:
        """Return the key of each sample of a batch."""
        inputs = self.select_inputs(teacher_entries(batch))
        return sample_keys(inputs, self._lengths(inputs))

    def look_up(self, batch: Mapping[str, Any]) -> Lookup:
        """Return what there is of a batch, on the CPU."""
        return self.read(self.keys(batch), token_count(self.select_inputs(teacher_entries(batch))))

    def read(self, keys: list[bytes], width: int | None) -> Lookup:
        """Return what there is of a batch whose samples have these keys and are padded to `width` tokens."""
        rows = self.store.read(keys)
        found = [row for row in rows if row is not None]
        return Lookup(keys, [row is not None for row in rows], to_batch(found, width))

    def rows(
        self, outputs: TeacherOutputs, inputs: Mapping[str, Any], samples: Sequence[int] | None = None
    ) -> list[Row]:
        """Return what is stored of each sample, where the outputs are those of some (`samples`) or all of a batch.

        `inputs` are those of the whole batch: it decides what is cut, as it does in the keys. Several rows per sample,
        and what overflows in the cache's precision, are refused (`InputError`).
        """
        if samples is None:
            samples = range(len(next(value for value in inputs.values() if isinstance(value, Tensor))))
        check_row_count(outputs, len(samples))
        lengths = self._lengths(inputs)
        ends = None if lengths is None else [lengths[index] for index in samples]
        return to_rows(outputs, ends, token_count(inputs), self.dtype)

    def _lengths(self, inputs: Mapping[str, Any]) -> list[int] | None:
        return right_padded_lengths(inputs) if self.cut else None


class CachingCollator:
    """A collator that also looks its samples up in the teacher cache, so that the step need not wait for the disk.

    A worker process of the data loader does this beside the training, without workers a thread (`in_thread`).
    """

    def __init__(self, collator: Callable[[Any], Mapping[str, Any]], cache: TeacherCache, *, in_thread: bool):
        self.collator = collator
        self.cache = cache
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher-cache") if in_thread else None

    def __call__(self, samples: Any) -> dict[str, Any]:
        """Return the batch, with what the cache holds of it under `CACHED`."""
        batch = dict(self.collator(samples))
        if self._thread is not None:
            return {**batch, CACHED: self._thread.submit(self.cache.look_up, batch)}
        return {**batch, CACHED: vars(self.cache.look_up(batch))}


def lookup_of(batch: Mapping[str, Any]) -> Lookup | None:
    """Return what a `CachingCollator` left in a batch, or None."""
    left = batch.get(CACHED)
    if isinstance(left, Future):
        return left.result()
    return None if left is None else Lookup(**left)
