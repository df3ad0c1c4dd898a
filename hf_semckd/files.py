"""Files that are there as a whole or not at all."""

import contextlib
import dataclasses
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from .errors import InputError, SaveError, SemCKDError

# What torch.save says where the disk is full or the folder is missing: it raises a RuntimeError then.
TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "Parent directory")


@contextlib.contextmanager
def saving(what: str, place: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what a full disk or a read-only folder raises, in Python or below it, into `SaveError`.

    `what` begins the message ("The checkpoint").
    """
    try:
        yield
    except SemCKDError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        # Errors of a network are OSErrors too, of which the system has given no number.
        network = isinstance(error, ConnectionError) or (isinstance(error, OSError) and error.errno is None)
        if network or (isinstance(error, RuntimeError) and not any(said in str(error) for said in TORCH_WRITER)):
            raise
        failure = SaveError(
            f"{what} could not be written",
            received=f"{type(error).__name__}: {error}",
            expected=f"room on the disk, and a folder that can be written: {os.fspath(place)}",
            todo="free the disk or choose another folder, and repeat it; what was written before is intact",
        )
        failure.errno = getattr(error, "errno", None)
        raise failure from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a file appear as a whole: give a temporary name beside it to write to, then rename, which is atomic.

    Missing parent folders are made. After a failure an old file is as it was, and no temporary file
    ("<name>.<unique number>.partial") stays. Raises `SaveError` where it cannot be written.
    """
    target = Path(path)
    # Not tempfile: its files are readable by their owner only, and the rename would keep that.
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    with saving(target.name, target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write a file as a whole or not at all, and return its path; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def write_json(path: str | os.PathLike[str], payload: object) -> Path:
    """Write a payload as JSON with `write_atomic` and return the path.

    It holds mappings, sequences, dataclasses, numpy arrays and scalars, torch tensors and JSON's own types; NaN and
    infinities become null. Anything else raises `InputError`, which tells its place in the payload.
    """
    return write_atomic(path, (json_text(payload) + "\n").encode("utf-8"))


def json_text(payload: object) -> str:
    """Return a payload as JSON; see `write_json`."""
    # allow_nan=False: should a NaN get past _jsonable, fail rather than write what strict readers refuse.
    return json.dumps(_jsonable(payload, "payload"), indent=2, ensure_ascii=False, allow_nan=False)


def _jsonable(value: object, place: str) -> object:
    """Return a value made of JSON's types only, `place` being where it lies in the payload."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_jsonable(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, Mapping):
        raise _no_json(place, value, "numbers, text, lists, mappings, dataclasses, arrays or tensors")
    for key in value:
        if not isinstance(key, (str, int, np.integer)) or isinstance(key, bool):
            raise _no_json(f"The key {key!r} of {place}", key, "text or an integer")
    return {str(key): _jsonable(item, f"{place}[{key!r}]") for key, item in value.items()}


def _no_json(what: str, value: object, expected: str) -> InputError:
    received = type(value).__name__
    return InputError(f"{what} has no form in JSON", received=received, expected=expected, todo="convert it first")
