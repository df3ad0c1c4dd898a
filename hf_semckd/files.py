"""Files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from .errors import InputError


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write to a temporary file beside the target and rename it, which is atomic on one file system.

    Args:
        path: File to write or replace, in a folder that exists. Until then, the file's name is followed by a unique
            number and `.partial`.
        parts: The content, piece by piece.

    Raises:
        OSError: When the file cannot be written; an old file is then left as it was, and no temporary file stays.
    """
    # Not tempfile: its files are readable by their owner only, and the rename would keep that.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(temporary, "xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], payload: object) -> Path:
    """Write a payload as JSON so that a reader finds the old file or the whole new one, never half of it.

    Args:
        path: File to write; missing parent folders are made.
        payload: Mappings, sequences, dataclasses, numpy arrays and scalars, torch tensors and JSON's own types,
            nested; NaN and infinities become null, which JSON has no word for.

    Returns:
        The path.

    Raises:
        InputError: When a value or key is of another type; the message tells its place in the payload.
        OSError: When the file cannot be written; an old file is then left as it was.
    """
    # allow_nan=False: should a NaN get past _jsonable, fail rather than write a file that strict readers refuse.
    text = json.dumps(_jsonable(payload, "payload"), indent=2, ensure_ascii=False, allow_nan=False)
    return write_atomic(path, (text + "\n").encode("utf-8"))


def write_atomic(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write bytes so that the file is there as a whole or not at all; see `files.write_atomically`.

    Args:
        path: File to write or replace; missing parent folders are made.
        content: The whole content.

    Returns:
        The path.

    Raises:
        OSError: When the file cannot be written; an old file is then left as it was, and no temporary file stays.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, [content])
    return target


def _jsonable(value: object, place: str) -> object:
    """Return a value made of JSON's types only, `place` being where it lies in the payload."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().tolist()
    elif isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_json_key(key, place): _jsonable(item, f"{place}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item, f"{place}[{index}]") for index, item in enumerate(value)]
    raise InputError(
        f"{place} has no form in JSON",
        received=type(value).__name__,
        expected="numbers, text, lists, mappings, dataclasses, arrays or tensors",
        todo="convert it first",
    )


def _json_key(key: object, place: str) -> str:
    if isinstance(key, str):
        return key
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        return str(int(key))
    raise InputError(
        f"A key of {place} has no form in JSON",
        received=f"{key!r} ({type(key).__name__})",
        expected="text or an integer",
        todo="convert it first",
    )
