"""Which checkpoints are whole: each is sealed, with a checksum of every file, when all of it is written."""

import contextlib
import fnmatch
import hashlib
import json
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback

from ..errors import CheckpointError
from ..files import write_json
from ..publishing.folder import STATE_FILE

logger = logging.getLogger(__name__)
SEAL = "checkpoint_files.json"
CHUNK = 1 << 20
# Stands in a seal while the checkpoint is being written.
UNFINISHED = "unfinished"
# What holds a student: whole weights, the index of shards, adapters (several in folders), and what engines write.
WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "adapter_model.*",
    "*/*.safetensors",
    "*/*.bin",
    "pytorch_model_fsdp*",
    "global_step*",
)


def break_seal(folder: Path) -> None:
    """Mark a checkpoint as unfinished, before its first file is written: it is passed over until `seal`."""
    write_json(folder / SEAL, {UNFINISHED: None})


def seal(folder: Path) -> None:
    """Write size and checksum of every file of a checkpoint beside them."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": checksum(folder / name)} for name in _names(folder)
    }
    write_json(folder / SEAL, files)


class _SealAgain(TrainerCallback):
    """Seals a checkpoint again into which another callback has written since: averaged weights, its own files."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and (folder / SEAL).is_file() and _is_touched(folder):
            seal(folder)


@contextlib.contextmanager
def resealing(trainer: Any) -> Iterator[None]:
    """Let what a trainer's callbacks write into a checkpoint in `on_save` belong to it."""
    last = _SealAgain()
    trainer.add_callback(last)
    try:
        yield
    finally:
        trainer.remove_callback(last)


def checkpoint_to_resume(asked: str | bool | None, output_dir: str | os.PathLike[str]) -> str | None:
    """Return the checkpoint to go on from: the one that is asked for, or for True the newest whole one.

    A run that was killed while it saved leaves half a checkpoint, which is passed over with a warning. Raises
    `CheckpointError` where there is none, or where a file is not what was written.
    """
    if asked is None or asked is False:
        return None
    if asked is not True:
        check_whole(Path(asked))
        return os.fspath(asked)
    faults: dict[str, str] = {}
    for folder in _newest_first(Path(output_dir)):
        fault = _fault(folder)
        if fault is None:
            for name, why in faults.items():
                logger.warning("%s is passed over: %s. Training goes on from %s.", name, why, folder.name)
            return str(folder)
        faults[folder.name] = fault
    raise CheckpointError(
        "There is no checkpoint to resume from",
        received="; ".join(f"{name}: {why}" for name, why in faults.items()) or "no checkpoint in output_dir",
        expected="a checkpoint of this run that is whole",
        todo="start with resume_from_checkpoint=None, or name another checkpoint",
    )


def newest_whole(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the newest whole checkpoint in a folder, or None where there is no checkpoint at all.

    Raises `CheckpointError` where there are some, and none is whole.
    """
    return checkpoint_to_resume(True, output_dir) if _newest_first(Path(output_dir)) else None


def check_whole(folder: Path) -> None:
    """Raise `CheckpointError`, with the name of the file, where a checkpoint is not what was written."""
    fault = fault_of(folder)
    if fault is not None:
        raise CheckpointError(
            "The checkpoint is not whole",
            received=f"{folder.name}: {fault}",
            expected="every file as it was written",
            todo="resume from another checkpoint, or with True from the newest whole one",
        )


def fault_of(folder: Path, apart_from: Sequence[str] = ()) -> str | None:
    """Return what is wrong with a checkpoint, by the name of the file, or None; files like `apart_from` may be."""
    return _fault(folder, apart_from) if folder.is_dir() else "there is no such folder"


def _is_touched(folder: Path) -> bool:
    """Whether a file was written after the seal, or is not in it, or gone; no file is read."""
    sealed, known = (folder / SEAL).stat().st_mtime_ns, _read(folder / SEAL) or {}
    names = _names(folder)
    return set(names) != set(known) or any((folder / name).stat().st_mtime_ns >= sealed for name in names)


def _newest_first(output_dir: Path) -> list[Path]:
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(filter(Path.is_dir, found), key=lambda path: -int(path.name.rpartition("-")[2]))


def _fault(folder: Path, apart_from: Sequence[str] = ()) -> str | None:
    """Return what is wrong with a checkpoint; of one without a seal, of another version, what can be known."""
    if not (folder / SEAL).is_file():
        return _fault_without_seal(folder, apart_from)
    files = _read(folder / SEAL)
    if files is None:
        return f"{SEAL} cannot be read, or says that not all was written"
    files = {name: known for name, known in files.items() if not _is_like(name, apart_from)}
    for name, known in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != known["bytes"]:
            return f"{name} has {size:,} bytes, not {known['bytes']:,}"
    changed = (name for name, known in files.items() if checksum(folder / name) != known["sha256"])
    return next((f"{name} was changed (another checksum)" for name in changed), None)


def _is_like(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _fault_without_seal(folder: Path, apart_from: Sequence[str]) -> str | None:
    """Return what is wrong by the formats' own checks: the state is written last, and torch's files have checksums."""
    if not _is_like(STATE_FILE, apart_from) and _read(folder / STATE_FILE) is None:
        return f"it has no whole {STATE_FILE}, which is written last"
    lost = _lost_weights(folder)
    if lost is not None:
        return lost
    found = sorted(entry for entry in folder.iterdir() if entry.suffix in (".safetensors", ".pt", ".pth"))
    for path in (entry for entry in found if not _is_like(entry.name, apart_from)):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="numpy"):
                    continue
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is None:
                    continue
        except (OSError, SafetensorError, zipfile.BadZipFile, zlib.error) as error:
            return f"{path.name} cannot be read ({error})"
        return f"{path.name} was changed (another checksum)"
    return None


def _lost_weights(folder: Path) -> str | None:
    if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        return "it holds no weights of a student (model.safetensors, its index or an adapter)"
    for index in sorted(folder.glob("*.index.json")):
        if index.with_name(index.name.removesuffix(".index.json")).is_file():
            continue  # whole weights go first
        shards = (_read(index) or {}).get("weight_map")
        if not isinstance(shards, dict):
            return f"{index.name} cannot be read"
        lost = next((name for name in sorted(set(map(str, shards.values()))) if not (folder / name).is_file()), None)
        if lost is not None:
            return f"{lost} is missing, which {index.name} names"
    return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if path.name != SEAL:
        return content if isinstance(content, dict) else None
    whole = isinstance(content, dict) and all(
        isinstance(known, dict) and isinstance(known.get("bytes"), int) and isinstance(known.get("sha256"), str)
        for known in content.values()
    )
    return content if whole else None


def _names(folder: Path) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != SEAL and not name.endswith(".partial"))


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(CHUNK), b""):
            found.update(chunk)
    return found.hexdigest()
