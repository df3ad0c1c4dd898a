"""A teacher whose outputs are kept on disk: it runs, and is even loaded, only for samples that the cache lacks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.outputs import tokens_mask
from .cache.cache import TeacherCache, lookup_of
from .cache.keys import teacher_fingerprint, token_count
from .cache.rows import to_batch, to_outputs
from .execution import TeacherStream
from .notes import TeacherNote, TeacherRequest, describe_extra_tokens, describe_inputs, read_note, write_note
from .outputs import TeacherDescription, TeacherOutputs
from .teacher import FeatureSelector, Teacher, keeping

logger = logging.getLogger(__name__)


class CachedTeacher:
    """A teacher in front of which a cache answers.

    Args:
        teacher: The teacher; around a model without weights where `load` is given.
        folder: Where all caches live.
        request: What is asked of the teacher, but for the inputs.
        digest: Of the files that it comes from; None where they are unknown, and nothing is noted then.
        load: Loads the teacher when it is needed; None when it is there.
        dtype: Precision of stored features; None for the teacher's own.
        limit_bytes: Most that the cache may take; None for what the disk can spare.

    Attributes:
        note: What is known of a teacher that is not loaded.
    """

    def __init__(
        self,
        teacher: Teacher,
        folder: str | os.PathLike[str],
        *,
        request: TeacherRequest,
        digest: str | None = None,
        load: Callable[[], Teacher] | None = None,
        dtype: torch.dtype | None = None,
        limit_bytes: int | None = None,
    ):
        self.folder = folder
        self.request = request
        self.digest = digest
        self.dtype = dtype
        self.limit_bytes = limit_bytes
        self.note: TeacherNote | None = None
        self._teacher = teacher
        self._load = load
        self._device: torch.device | None = None
        self._cache: TeacherCache | None = None

    @property
    def loaded(self) -> bool:
        """Whether the weights are there."""
        return self._load is None

    @property
    def model(self) -> nn.Module:
        """The model, with or without weights."""
        return self._teacher.model

    @property
    def stream(self) -> TeacherStream:
        """Runs it beside the student on CUDA."""
        return self._teacher.stream

    @property
    def layer_names(self) -> list[str]:
        """The chosen layers as text."""
        return self._teacher.layer_names

    @property
    def is_open(self) -> bool:
        """Whether the cache was opened."""
        return self._cache is not None

    @property
    def cache(self) -> TeacherCache:
        """The cache, once it was opened."""
        assert self._cache is not None, "open the cache first"
        return self._cache

    def to(self, device: torch.device) -> None:
        """Move the teacher; see `Teacher.to`."""
        self._device = device
        if self.loaded:
            self._teacher.to(device)

    def load(self) -> Teacher:
        """Return the teacher with its weights, which are loaded if they are not there.

        Raises:
            InputError: When they are others than those that the cache was opened for.
        """
        if self._load is None:
            return self._teacher
        logger.info("The teacher is needed, and loaded now.")
        load, self._load = self._load, None
        known, self.note = self.note, None
        layers = self._teacher.capture.layers
        self._teacher = load()
        self._teacher.capture.layers = layers
        if self._device is not None:
            self._teacher.to(self._device)
        if known is not None and self._cache is not None and known.weights != self._teacher.weights():
            raise InputError(
                "The teacher's files are not those that the cache knows",
                received="other weights than when this teacher was noted beside the cache",
                expected="the same weights under the same name",
                todo="start again: the new weights get a cache of their own",
            )
        return self._teacher

    def describe(self, batch: Mapping[str, Any], *, logits: bool, features: bool) -> TeacherDescription:
        """Say what the layers look like, from a note where this kind of batch was noted; see `Teacher.describe`."""
        if self._load is not None:
            assert self.digest is not None
            inputs = self.inputs(batch)
            self.note = read_note(self.folder, self.digest, self.request.key() + describe_inputs(inputs))
        if self.note is None:
            return self.load().describe(batch, logits=logits, features=features)
        if features:
            self._teacher.capture.layers = list(self.note.layers)
        specs = self.note.specs_for(inputs) if features else []
        return TeacherDescription(self.note.logits if logits else None, specs, [])

    def open(
        self, batch: Mapping[str, Any], described: TeacherDescription, *, kept: str, logits: bool, features: bool
    ) -> TeacherCache:
        """Open the cache for the layers that were described.

        Args:
            batch: What was described.
            described: What was found.
            kept: What is kept of the features; a cache is shared by those who keep the same.
            logits: Whether logits are stored.
            features: Whether the chosen layers' features are stored.
        """
        self.close()
        cut = self.note.cut if self.note is not None else _cuts_padding(described, self.inputs(batch))
        layers = self._teacher.capture.layers or () if features else ()
        weights = self._teacher.weights() if self.note is None else self.note.weights
        self._cache = TeacherCache(
            self.folder,
            teacher_fingerprint(weights, layers, logits, f"{kept} {self.dtype}"),
            self._teacher.select_inputs,
            dtype=self.dtype,
            limit_bytes=self.limit_bytes,
            cut=cut,
        )
        return self._cache

    def write_note(self, batch: Mapping[str, Any], described: TeacherDescription) -> None:
        """Note what was found, so that the next run need not load a teacher that is given by name or folder."""
        if self.digest is None or not self.loaded:
            return
        inputs, logits = self.inputs(batch), described.logits
        if logits is not None:
            # Without the batch, and without the tokens where there are some.
            logits = logits[-1:] if len(logits) == 3 else logits[1:]
        note = TeacherNote(
            self._teacher.weights(),
            list(self._teacher.capture.layers or ()),
            described.specs,
            describe_extra_tokens(described.specs, inputs),
            logits,
            self.cache.cut,
        )
        write_note(self.folder, self.digest, self.request.key() + describe_inputs(inputs), note)

    def run(
        self, batch: Mapping[str, Any], *, logits: bool, features: bool, select: FeatureSelector | None = None
    ) -> TeacherOutputs:
        """Return logits and features for a training batch, from the cache where it can; see `Teacher.run`."""
        cache, lookup, inputs = self.cache, lookup_of(batch), self.inputs(batch)
        width = token_count(inputs)
        if lookup is None:
            lookup = cache.look_up(batch)
        elif not all(lookup.present):
            # What was missing when the batch was made may be there by now.
            lookup = cache.read(lookup.keys, width)
        device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        missing = [index for index, present in enumerate(lookup.present) if not present]
        stored = {name: value.to(device, non_blocking=True) for name, value in lookup.values.items()}
        if missing:
            teacher = self.load()
            inputs = teacher.inputs(batch)
            part = {name: value[missing] if isinstance(value, Tensor) else value for name, value in inputs.items()}
            keep = keeping(select, lambda: teacher.phases(batch)[missing])
            rows = cache.rows(teacher.compute(part, None, keep, logits=logits, features=features), part)
            cache.store.write([lookup.keys[index] for index in missing], rows)
            # As stored, in the stored precision: a sample is the same when it is met again.
            stored = to_batch(_merged(stored, lookup.present, rows, device), width)
        outputs = to_outputs(stored, len(self._teacher.capture.layers or ()))
        outputs.mask = tokens_mask(inputs.get("attention_mask"), [])
        return outputs

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the teacher's keywords; see `Teacher.inputs`."""
        return self._teacher.inputs(batch)

    def check_finite(self, outputs: TeacherOutputs) -> None:
        """Refuse NaN and infinite outputs; see `outputs.check_finite`."""
        self._teacher.check_finite(outputs)

    def remove_traces(self) -> None:
        """Take off what transformers leaves on the model."""
        self._teacher.remove_traces()

    def flush(self) -> None:
        """Bring what is waiting to the disk."""
        if self._cache is not None:
            self._cache.store.flush()

    def close(self) -> None:
        """Let go of the cache."""
        if self._cache is not None:
            self._cache.store.close()
            self._cache = None


def _cuts_padding(described: TeacherDescription, inputs: Mapping[str, Any]) -> bool:
    """Whether all that the teacher gives for tokens is as long as their mask."""
    tokens = token_count(inputs)
    lengths = [spec.length for spec in described.specs if spec.kind == "tokens" and spec.length != 1]
    if described.logits is not None and len(described.logits) == 3:
        lengths.append(described.logits[1])
    return tokens is None or all(length == tokens for length in lengths)


def _merged(
    stored: Mapping[str, Tensor], present: Sequence[bool], computed: Sequence[dict[str, Tensor]], device: torch.device
) -> list[dict[str, Tensor]]:
    """Return the rows of a batch in order: those that were stored, and those that were missing."""
    found = iter([{name: value[index] for name, value in stored.items()} for index in range(sum(present))])
    missing = iter([{name: value.to(device) for name, value in row.items()} for row in computed])
    return [next(found if there else missing) for there in present]
