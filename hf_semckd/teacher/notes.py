"""Notes beside a cache: what a training has to know of a teacher that it need not load."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from ..features.layers import FeatureSpec
from .cache.keys import token_count
from .cache.store import read_manifest, write_manifest

logger = logging.getLogger(__name__)
SOURCES = "sources"
READ_BYTES = 2**22


@dataclass(frozen=True)
class TeacherRequest:
    """What is asked of a teacher, but for the inputs.

    Attributes:
        head: The student's task head, which the teacher is loaded with.
        layers: The layers that the user chose, or the method that names its own; None for all blocks.
        dtype: The precision that is wanted.
        logits: Whether logits are needed.
        features: Whether features are needed.
    """

    head: str
    layers: list[Any] | str | None
    dtype: str
    logits: bool
    features: bool

    def key(self) -> str:
        """Return the request as text, with which the key of a note begins."""
        return repr(dataclasses.astuple(self))


@dataclass(frozen=True)
class TeacherNote:
    """What a training has to know of a teacher without running it; kept beside the cache.

    Attributes:
        weights: Digest of its weights.
        layers: The layers that were found for what was asked.
        specs: What they look like.
        extra_tokens: By how many tokens each layer is longer than the batch's mask, or None for images.
        logits: Shape of the logits without the batch and, where they are per token, without the tokens.
        cut: See `TeacherCache`.
    """

    weights: str
    layers: list[int | str]
    specs: list[FeatureSpec]
    extra_tokens: list[int | None]
    logits: tuple[int, ...] | None
    cut: bool = True

    def specs_for(self, inputs: Mapping[str, Any]) -> list[FeatureSpec]:
        """Return the layers as they are for a batch: sequences are as long as its mask says."""
        tokens = token_count(inputs)
        return [
            spec if extra is None or tokens is None else dataclasses.replace(spec, length=tokens + extra)
            for spec, extra in zip(self.specs, self.extra_tokens, strict=True)
        ]


def source_digest(source: object) -> str | None:
    """Return a digest of the files behind a name or folder, or None when they are not all on this machine.

    Args:
        source: What `from_pretrained` takes; a module has no files.
    """
    if not isinstance(source, (str, os.PathLike)):
        return None
    folder = Path(source)
    if not folder.is_dir():
        found = try_to_load_from_cache(str(source), "config.json")
        if not isinstance(found, str):
            return None
        folder = Path(found).parent
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        return None
    digest = hashlib.blake2b(digest_size=20)
    try:
        for path in (folder / "config.json", *weights):
            digest.update(f"{path.name}:{path.stat().st_size};".encode())
            with path.open("rb") as file:
                while block := file.read(READ_BYTES):
                    digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def describe_extra_tokens(specs: Sequence[FeatureSpec], inputs: Mapping[str, Any]) -> list[int | None]:
    """Return by how many tokens each layer is longer than the batch's mask, or None for maps, images and vectors."""
    tokens = token_count(inputs)
    extra: list[int | None] = []
    for spec in specs:
        along = tokens is not None and spec.kind == "tokens" and spec.grid is None and spec.length >= tokens
        extra.append(spec.length - tokens if along and tokens is not None else None)
    return extra


def describe_inputs(inputs: Mapping[str, Any]) -> str:
    """Say what of a batch decides how the teacher's layers look: its shapes, but for the length of padded text."""
    tokens, said = token_count(inputs), {}
    for name, value in inputs.items():
        shape = tuple(getattr(value, "shape", ()))[1:]
        said[name] = "tokens" if tokens is not None and shape[:1] == (tokens,) else shape
    return repr(sorted(said.items()))


def write_note(folder: str | os.PathLike[str], digest: str, asked: str, note: TeacherNote) -> None:
    """Keep a note; a folder that cannot be written costs only the loading of the teacher next time.

    Args:
        folder: Where all caches live.
        digest: Of the teacher's files.
        asked: What was asked of the teacher: precision and layers.
        note: What is known.
    """
    notes = {**_notes(folder, digest), asked: dataclasses.asdict(note)}
    try:
        write_manifest(Path(folder) / SOURCES / digest, notes)
    except OSError as error:
        logger.debug("no note of the teacher was kept: %s", error)


def is_noted(folder: str | os.PathLike[str], digest: str, request: TeacherRequest) -> bool:
    """Whether anything is known of a teacher for what is asked, whatever the inputs."""
    return any(entry.startswith(request.key()) for entry in _notes(folder, digest))


def read_note(folder: str | os.PathLike[str], digest: str, asked: str) -> TeacherNote | None:
    """Return what is known of a teacher, or None."""
    entry: Any = _notes(folder, digest).get(asked)
    try:
        specs = [
            FeatureSpec(**{**fields, "grid": None if fields["grid"] is None else tuple(fields["grid"])})
            for fields in entry["specs"]
        ]
        logits = None if entry["logits"] is None else tuple(entry["logits"])
        return TeacherNote(entry["weights"], entry["layers"], specs, entry["extra_tokens"], logits, entry["cut"])
    except (KeyError, TypeError):
        return None


def _notes(folder: str | os.PathLike[str], digest: str) -> dict[str, Any]:
    """Return all notes of the teacher whose files have a digest, by what was asked."""
    return read_manifest(Path(folder) / SOURCES / digest) or {}
