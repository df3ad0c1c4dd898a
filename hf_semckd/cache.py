"""Teacher outputs on disk, keyed by what the teacher was given, so that no epoch and no run computes them twice."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Changes when what is stored, or how it is keyed, changes.
FORMAT = 1
KEY_BYTES = 20
LOCATION_SETTINGS = ("_name_or_path", "transformers_version")


class OutputCache:
    """One safetensors file a sample, below a folder for one teacher and one choice of layers.

    The key is the content of the teacher's inputs after preprocessing and augmentation, without padding. A changed
    dataset, tokenizer, image size or random crop is therefore another sample, never a wrong hit. Files appear by
    renaming, so concurrent runs may share a folder, and an unreadable file counts as absent and is written again.

    Args:
        folder: Where all caches live; made when needed.
        fingerprint: What the outputs depend on besides the inputs; see `teacher_fingerprint`.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str):
        self.folder = Path(folder) / fingerprint
        self.hits = 0
        self.misses = 0
        self._writable = True

    def load(self, key: str, device: torch.device | str) -> tuple[dict[str, Tensor], set[str]] | None:
        """Return a sample's tensors and the names of those that run along its tokens, or None when it is absent."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                sequences = set(json.loads(file.metadata()["sequences"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            # Absent, torn by a crash of the machine, or foreign: the teacher will tell again.
            self.misses += 1
            return None
        self.hits += 1
        return tensors, sequences

    def save(self, key: str, tensors: Mapping[str, Tensor], sequences: set[str]) -> None:
        """Store a sample's tensors; a full or read-only disk ends the storing, not the training."""
        if not self._writable:
            return
        path = self._path(key)
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
            os.close(handle)
            contents = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            save_file(contents, temporary, metadata={"sequences": json.dumps(sorted(sequences))})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            self._writable = False
            logger.warning("The teacher cache cannot be written any more, and training goes on without: %s", error)
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def sample_keys(inputs: Mapping[str, Any], lengths: Sequence[int] | None) -> list[str]:
    """Return one key a sample: a digest of its inputs, cut to its own length where it is padded.

    Args:
        inputs: The teacher's inputs; tensors whose first dimension is the batch.
        lengths: Number of tokens of each sample, when padding follows them; None when nothing is cut.
    """
    tensors = {name: value.detach().cpu() for name, value in sorted(inputs.items()) if isinstance(value, Tensor)}
    constants = repr(sorted((name, repr(value)) for name, value in inputs.items() if name not in tensors))
    width = inputs["attention_mask"].shape[1] if lengths is not None else None
    keys = []
    for index in range(len(next(iter(tensors.values())))):
        digest = hashlib.blake2b(constants.encode(), digest_size=KEY_BYTES)
        for name, value in tensors.items():
            row = value[index]
            if lengths is not None and row.dim() and row.shape[0] == width:
                row = row[: lengths[index]]
            digest.update(f"{name}:{row.dtype}:{tuple(row.shape)};".encode())
            digest.update(row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        keys.append(digest.hexdigest())
    return keys


def right_padded_lengths(inputs: Mapping[str, Any]) -> list[int] | None:
    """Return the length of each sample where padding follows the tokens, or None when anything else is masked."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    mask = mask.bool()
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        return None
    return [int(length) for length in mask.sum(1).tolist()]


def teacher_fingerprint(model: nn.Module, layers: Sequence[object], logits: bool) -> str:
    """Return a digest of all that decides a teacher's outputs besides its inputs: weights, kind, layers.

    Args:
        model: The teacher; every weight is read once.
        layers: The layers that are stored.
        logits: Whether logits are stored.
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    config: Any = getattr(model, "config", None)
    settings = dict(config.to_dict()) if hasattr(config, "to_dict") else {"model": repr(model)}
    # Where the weights came from does not matter: they are digested themselves.
    described = repr(sorted((key, value) for key, value in settings.items() if key not in LOCATION_SETTINGS))
    digest.update(repr((FORMAT, type(model).__qualname__, list(map(str, layers)), logits)).encode())
    digest.update(described.encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
