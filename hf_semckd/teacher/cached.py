"""A teacher whose outputs are kept on disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..choices import TeacherPlacement
from ..data.columns import teacher_entries
from ..errors import ConfigurationError, InputError
from ..losses import FeatureLoss
from ..losses.sampled_logits import TokenSampling
from ..models.images import ImageAdaptation
from ..models.outputs import device_of, tokens_mask
from ..models.packing import Documents
from .cache.cache import TeacherCache, lookup_of, teacher_fingerprint, token_count
from .cache.rows import RowCheck, is_alike, to_batch, to_outputs
from .cache.store import TensorStore
from .notes import TeacherNote, TeacherRequest, is_plausible, read_note, write_note
from .outputs import TeacherDescription, TeacherOutputs, check_finite
from .teacher import Teacher

logger = logging.getLogger(__name__)


class CachedTeacher:
    """A teacher that runs, and is even loaded, only for samples that the cache lacks.

    All caches live in `folder`; `dtype` is that of `TeacherCache`, `limit_bytes` that of its store. With `load`, which
    loads it when needed, the teacher has no weights until then, and `note` is what is known of it. `digest` is that of
    the files it comes from; None where they are unknown, and nothing is noted. `computed` counts the samples that it
    ran on.
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
        self.folder, self.dtype, self.limit_bytes = folder, dtype, limit_bytes
        self.request, self.digest = request, digest
        self.note: TeacherNote | None = None
        self.computed = 0
        self._teacher, self._load = teacher, load
        self._placement: tuple[torch.device, TeacherPlacement] | None = None
        self._cache: TeacherCache | None = None

    @property
    def model(self) -> nn.Module:
        """The model, with or without weights."""
        return self._teacher.model

    @property
    def images(self) -> ImageAdaptation:
        """What is done to images before the teacher gets them."""
        return self._teacher.images

    @images.setter
    def images(self, images: ImageAdaptation) -> None:
        self._teacher.images = images

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The CUDA stream that the teacher runs on; None elsewhere."""
        return self._teacher.stream

    @property
    def runs_together(self) -> bool:
        """Never: each process runs the teacher for what it lacks."""
        return False

    @property
    def layer_names(self) -> list[str]:
        """The chosen layers as text."""
        return self._teacher.layer_names

    @property
    def cache(self) -> TeacherCache:
        """The cache; `open` comes first."""
        assert self._cache is not None
        return self._cache

    def to(self, device: torch.device, placement: TeacherPlacement = "device") -> None:
        """Place the teacher, now or when it is loaded; see `Teacher.to`."""
        self._placement = device, placement
        if self._load is None:
            self._place()

    def _place(self) -> None:
        if self._placement is not None:
            if self._placement[1] != "device":
                # Digested while the weights are together.
                _ = self._teacher.weights
            self._teacher.to(*self._placement)
        if self._teacher.runs_together:
            raise ConfigurationError(
                "A teacher that is divided among processes cannot be cached: they would run it for different samples",
                received="teacher_cache_dir, and a sharded teacher",
                expected="one of the two",
                todo="fill the cache with teacher_placement='offload', or leave teacher_cache_dir out",
            )

    def load(self) -> Teacher:
        """Return the teacher with its weights; `InputError` if they are not those that the cache was opened for."""
        if self._load is None:
            return self._teacher
        logger.info("The teacher is needed, and loaded now.")
        load, self._load = self._load, None
        known, self.note = self.note, None
        layers, images = self._teacher.capture.layers, self._teacher.images
        self._teacher = load()
        self._teacher.capture.layers, self._teacher.images = layers, images
        self._place()
        if known is not None and self._cache is not None and known.weights != self._teacher.weights:
            raise InputError(
                "The teacher's files are not those that the cache knows",
                received="other weights than when this teacher was noted beside the cache",
                expected="the same weights under the same name",
                todo="start again: the new weights get a cache of their own",
            )
        return self._teacher

    def describe(self, batch: Mapping[str, Any], *, logits: bool, features: bool) -> TeacherDescription:
        """Say what the layers look like, from a note where this kind of batch was noted; see `Teacher.describe`."""
        inputs = self.inputs(batch)
        if self._load is not None:
            assert self.digest is not None
            self.note = read_note(self.folder, self.digest, self.request.key(inputs))
            if self.note is not None and not is_plausible(self.note, self.model, inputs):
                logger.warning("What is noted of the teacher in %s cannot be true, and is not used.", self.folder)
                self.note = None
        if self.note is None:
            return self.load().describe(batch, logits=logits, features=features)
        if features:
            self._teacher.capture.layers = list(self.note.layers)
        specs = self.note.specs_for(inputs) if features else []
        return TeacherDescription(self.note.logits if logits else None, specs, [], noted=True)

    def open(
        self,
        batch: Mapping[str, Any],
        described: TeacherDescription,
        *,
        kept: str,
        logits: bool,
        features: bool,
        sampling: TokenSampling | None = None,
    ) -> None:
        """Open the cache for what was described of a batch; those who keep the same of the features share it.

        With `sampling` it keeps tokens drawn from the logits in their place.
        """
        if self._cache is not None:
            self._cache.store.close()
        if Documents.of(teacher_entries(batch)) is not None:
            raise ConfigurationError(
                "The teacher cache does not support packed rows, which other documents make up every time",
                received="teacher_cache_dir with position_ids that start again",
                expected="one document a row, or no cache",
                todo="pad the documents (DataCollatorWithPadding), or leave teacher_cache_dir out",
            )
        if self._teacher.capture.sides:
            raise ConfigurationError(
                "The teacher cache does not support models whose layers read different inputs",
                received=f"teacher_cache_dir with {type(self.model).__name__}, which has several encoders",
                expected="one encoder or decoder, or no cache",
                todo="leave teacher_cache_dir out",
            )
        layers = self._teacher.capture.layers or () if features else ()
        weights = self._teacher.weights if self.note is None else self.note.weights
        images = self._teacher.images
        kept = f"{kept} {self.dtype}" + ("" if images == ImageAdaptation() else f" {images}")
        kept += "" if sampling is None else f" {sampling}"
        name = teacher_fingerprint(weights, layers, logits, kept)
        store = TensorStore(Path(self.folder) / name, limit_bytes=self.limit_bytes)
        cut = _cuts_padding(described, self.inputs(batch)) if self.note is None else self.note.cut
        check = self._row_check(described, sampling)
        self._cache = TeacherCache(store, self._teacher.select_inputs, self.dtype, cut, check, sampling)

    def _row_check(self, described: TeacherDescription, sampling: TokenSampling | None) -> RowCheck:
        """Return what stored rows must look like."""
        shape = described.logits_of_a_position
        channels = tuple(spec.channels for spec in described.specs)
        whole = described.logits is not None and sampling is None
        return RowCheck(whole, shape[0] if shape else None, channels, sampling)

    def write_note(self, batch: Mapping[str, Any], described: TeacherDescription) -> None:
        """Note what was found, so that the next run need not load a teacher that is given by name or folder."""
        plain = self._teacher.capture.known_by_name and self._teacher.images.size is None
        known = described.noted or self._load is not None
        if self.digest is None or known or not plain or self._teacher.images.interpolates:
            return
        inputs, logits = self.inputs(batch), described.logits_of_a_position
        layers = list(self._teacher.capture.layers or ())
        weights = self._teacher.weights
        note = TeacherNote(weights, layers, described.specs, token_count(inputs), logits, self.cache.cut)
        write_note(self.folder, self.digest, self.request.key(inputs), note)

    def run(
        self, batch: Mapping[str, Any], *, logits: bool, features: bool, loss: FeatureLoss | None = None
    ) -> TeacherOutputs:
        """Return logits and features for a training batch, from the cache where it can; see `Teacher.run`."""
        cache, lookup, inputs = self.cache, lookup_of(batch, self.cache), self.inputs(batch)
        if lookup is None or not all(lookup.present):
            # What was missing when the batch was made may be there by now.
            lookup = cache.look_up(batch, None if lookup is None else lookup.keys)
        device = device_of(inputs.values())
        stored = {name: value.to(device, non_blocking=True) for name, value in lookup.values.items()}
        missing = [index for index, present in enumerate(lookup.present) if not present]
        if missing:
            self.computed += len(missing)
            outputs = self.load().run(batch, logits=logits, features=features, loss=loss, samples=missing)
            # Stored, it would break later runs too.
            check_finite(outputs, self.layer_names, samples=missing)
            computed = cache.rows(outputs, inputs, lookup.keys, missing)
            if stored and not is_alike(computed[0], {name: value[0] for name, value in lookup.values.items()}):
                raise InputError(
                    "The teacher cache holds rows of another kind than the teacher gives",
                    received=f"{', '.join(sorted(stored))} in {cache.store.folder}",
                    expected=", ".join(sorted(computed[0])),
                    todo=f"delete {cache.store.folder}: it is made again",
                )
            cache.store.write([lookup.keys[index] for index in missing], computed)
            # As stored, in the stored precision: a sample is the same when it is met again.
            fresh = iter([{name: value.to(device) for name, value in row.items()} for row in computed])
            found = iter([{name: value[n] for name, value in stored.items()} for n in range(sum(lookup.present))])
            stored = to_batch([next(found if present else fresh) for present in lookup.present], token_count(inputs))
        outputs = to_outputs(stored, len(self._teacher.capture.layers or ()))
        given = outputs.logits if outputs.sampled is None else outputs.sampled.ids
        along = [given] if given is not None and given.dim() == 3 else []
        outputs.mask = tokens_mask(inputs.get("attention_mask"), along, self.model)
        return outputs

    def answers(self, batch: Mapping[str, Any]) -> bool:
        """Whether the outputs for a batch are all in the cache."""
        return all(self.cache.look_up(batch).present)

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the teacher's keywords; see `Teacher.inputs`."""
        return self._teacher.inputs(batch)

    def remove_traces(self) -> None:
        """Take off what transformers leaves on the model."""
        self._teacher.remove_traces()

    def flush(self) -> None:
        """Bring what is waiting to the disk."""
        if self._cache is not None:
            self._cache.store.flush()


def _cuts_padding(described: TeacherDescription, inputs: Mapping[str, Any]) -> bool:
    """Whether all that the teacher gives for tokens is as long as their mask."""
    tokens = token_count(inputs)
    lengths = [spec.length for spec in described.specs if spec.kind == "tokens" and spec.length != 1]
    if described.logits is not None and not described.noted and len(described.logits) == 3:
        lengths.append(described.logits[1])
    return tokens is None or all(length == tokens for length in lengths)
