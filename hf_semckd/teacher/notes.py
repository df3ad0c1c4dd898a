"""Notes beside a cache: what a training has to know of a teacher that it need not load."""

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from ..features.layers import FeatureSpec
from ..files import write_json
from .cache.cache import token_count

logger = logging.getLogger(__name__)
READ_BYTES = 2**22
PROMPT = 4096
# No text is longer, and no vocabulary larger.
LONGEST = 2**24


@dataclass(frozen=True)
class TeacherRequest:
    """What is asked of a teacher, but for the inputs.

    The teacher is loaded with the student's task `head`. `layers` are those that the user chose, or the method that
    names its own; None for all blocks.
    """

    head: str
    layers: list[Any] | str | None
    dtype: str
    logits: bool
    features: bool

    def key(self, inputs: Mapping[str, Any]) -> str:
        """Return the request as text, and what of the inputs decides how the teacher's layers look: their shapes.

        The length of padded text does not.
        """
        tokens, said = token_count(inputs), {}
        for name, value in inputs.items():
            shape = tuple(getattr(value, "shape", ()))[1:]
            said[name] = "tokens" if tokens is not None and shape[:1] == (tokens,) else shape
        return f"{self}{sorted(said.items())}"


@dataclass(frozen=True)
class TeacherNote:
    """What a training has to know of a teacher without running it; kept beside the cache. `cut`: see `TeacherCache`.

    Attributes:
        weights: Digest of its weights.
        tokens: Number of tokens in the mask of the batch that the layers were found with; None without a mask.
        logits: Shape of the logits without the batch and, where they are per token, without the tokens.
    """

    weights: str
    layers: list[int | str]
    specs: list[FeatureSpec]
    tokens: int | None
    logits: tuple[int, ...] | None
    cut: bool

    def specs_for(self, inputs: Mapping[str, Any]) -> list[FeatureSpec]:
        """Return the layers as they are for a batch: sequences are as long as its mask says."""
        tokens, noted = token_count(inputs), self.tokens
        if tokens is None or noted is None:
            return self.specs
        # A teacher may put tokens of its own in front of the text; one that pools them gives fewer.
        return [
            dataclasses.replace(spec, length=spec.length + tokens - noted)
            if spec.kind == "tokens" and spec.grid is None and spec.length >= noted
            else spec
            for spec in self.specs
        ]


def is_plausible(note: TeacherNote, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether what a note says can be true of a model, whose weights need not be there, on a batch of inputs.

    A damaged or made-up note would otherwise decide how much memory the projections take.
    """
    sizes = {size for entry in model.parameters() for size in entry.shape}
    # No layer has more positions than its input has numbers, but for prompts.
    longest = max([PROMPT, *(math.prod(value.shape[1:]) for value in inputs.values() if isinstance(value, Tensor))])
    layers, numbers = note.layers, [note.tokens if note.tokens is not None else 1, *(note.logits or ())]
    for spec in note.specs:
        numbers += [spec.length, spec.prefix + 1, *(spec.grid or ())]
    return (
        isinstance(note.weights, str)
        and isinstance(layers, list)
        and len(layers) == len(note.specs)
        and all(type(layer) in (int, str) for layer in layers)
        and all(type(number) is int and 0 < number <= LONGEST for number in numbers)
        and all(spec.length <= longest for spec in note.specs)
        and (note.logits is None or (len(note.logits) > 0 and note.logits[0] in sizes))
        and all(type(spec.channels) is int and spec.channels in sizes for spec in note.specs)
        and all(spec.grid is None or math.prod(spec.grid) + spec.prefix <= spec.length for spec in note.specs)
        and all(spec.kind in ("map", "tokens") and isinstance(spec.name, str) for spec in note.specs)
    )


def source_digest(source: object) -> str | None:
    """Return a digest of the files behind a name or folder, or None when they are not all on this machine."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    folder = Path(source)
    if not folder.is_dir():
        found = try_to_load_from_cache(str(source), "config.json")
        if not isinstance(found, str):
            return None
        folder = Path(found).parent
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
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


def write_note(folder: str | os.PathLike[str], digest: str, asked: str, note: TeacherNote) -> None:
    """Keep a note; a folder that cannot be written costs only the loading of the teacher next time."""
    try:
        write_json(_path(folder, digest), {**_notes(folder, digest), asked: note})
    except OSError as error:
        logger.debug("no note of the teacher was kept: %s", error)


def is_noted(folder: str | os.PathLike[str], digest: str, request: TeacherRequest) -> bool:
    """Whether anything is known of a teacher for this request, whatever the inputs."""
    return any(entry.startswith(str(request)) for entry in _notes(folder, digest))


def read_note(folder: str | os.PathLike[str], digest: str, asked: str) -> TeacherNote | None:
    """Return what is known of a teacher, or None."""
    entry: Any = _notes(folder, digest).get(asked)
    try:
        specs = [FeatureSpec(**{**spec, "grid": spec["grid"] and tuple(spec["grid"])}) for spec in entry["specs"]]
        logits = None if entry["logits"] is None else tuple(entry["logits"])
        return TeacherNote(**{**entry, "specs": specs, "logits": logits})
    except (KeyError, TypeError):
        return None


def _notes(folder: str | os.PathLike[str], digest: str) -> dict[str, Any]:
    """Return all notes of the teacher whose files have this digest, by `TeacherRequest.key`; none where damaged."""
    try:
        notes = json.loads(_path(folder, digest).read_bytes())
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _path(folder: str | os.PathLike[str], digest: str) -> Path:
    return Path(folder) / "sources" / digest / "manifest.json"
