"""Tensors of many samples on disk, in a few large files that are mapped into memory instead of read."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ...errors import InputError, message
from ...files import write_atomically
from .shard import KEY_BYTES, Buffer, Row, Shard, discard, layout_of

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20

# What a store leaves free on its disk: checkpoints and everybody else's files need room too.
RESERVE_BYTES = 2**30

RESERVE_SHARE = 0.02

MANIFEST = "manifest.json"

# The version of the format is part of the name, so that files of another version are foreign and left alone. The
# time comes next: of two rows with one key, the one in the file that sorts last counts.
SHARD_NAME = re.compile(r"rows-v1-\d{20}-[0-9a-f]{32}\.safetensors")

LEFTOVER_NAME = re.compile(r"(rows-v1-.*|manifest\.json)\.[0-9a-f]{32}\.partial")

LEFTOVER_SECONDS = 24 * 3600

# Full buffers that may wait for the disk before `write` waits too.
WAITING_BUFFERS = 2

REFRESH_SECONDS = 1.0

# A folder's time of change is trusted when it is older than the coarsest clock of a file system.
SETTLED_NANOSECONDS = 2 * 10**9

ADVICE = (
    'lower max_tokens, name fewer teacher_layers, set teacher_cache_dtype="float16", raise '
    "teacher_cache_limit_gb, or choose a folder on another disk."
)


class TensorStore:
    """Per-sample tensors, each sample under a key, in memory-mapped safetensors files that several runs may share.

    Rows are gathered and written by a background thread, a file at a time. A file appears by renaming, so a reader
    never sees half of one; what is damaged nevertheless counts as absent and is written again. A disk that is full,
    limited or read-only ends the storing with one warning, never the training. Copies that arrive in another process,
    by pickling or by a fork, only read.

    Args:
        folder: Where the files live; made when needed.
        limit_bytes: Total size of the folder that is not exceeded; None for no limit but that of the disk.
        shard_bytes: Size of a file, in tensors; a larger row gets a file of its own.
    """

    _buffer: Buffer | None
    _waiting: list[Buffer]
    _written: list[tuple[str, Buffer]]
    _thread: threading.Thread | None

    def __init__(
        self, folder: str | os.PathLike[str], *, limit_bytes: int | None = None, shard_bytes: int = SHARD_BYTES
    ):
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes
        self.shard_bytes = shard_bytes
        self.hits = 0
        self.misses = 0
        self._shards: list[Shard] = []
        self._names: set[str] = set()
        # Key -> number of the shard in the upper half, number of the row in the lower: an int is small, and there
        # may be millions.
        self._index: dict[bytes, int] = {}
        self._folder_time = 0
        self._refreshed = 0.0
        self._writable = True
        self._start_over()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._stop_after(error)
        _remove_leftovers(self.folder)
        self.refresh()

    @property
    def writable(self) -> bool:
        """Whether rows are still taken: a full, limited or read-only disk ends that."""
        return self._writable

    def read(self, keys: Sequence[bytes]) -> list[Row | None]:
        """Return each key's tensors on the CPU, or None where they are absent or damaged.

        The tensors are views of mapped files: clone or stack them before changing them in place, saving them or
        sending them to another process, which would take the whole file along.

        Args:
            keys: Keys of `KEY_BYTES` bytes.
        """
        with self._own_lock():
            self._adopt()
            places = [self._find(key) for key in keys]
            if None in places and time.monotonic() - self._refreshed > REFRESH_SECONDS:
                self.refresh()
                places = [self._find(key) for key in keys]
        rows: list[Row | None] = []
        # Outside the lock, because this is where files are read.
        for key, place in zip(keys, places, strict=True):
            row = None if place is None else place[0].row(place[1])
            if place is not None and row is None:
                self._forget(key, place[0])
            rows.append(row)
        absent = rows.count(None)
        self.misses += absent
        self.hits += len(rows) - absent
        return rows

    def write(self, keys: Sequence[bytes], rows: Sequence[Mapping[str, Tensor]]) -> None:
        """Take over copies of rows; they can be read at once and reach the disk in the background.

        Args:
            keys: Keys of `KEY_BYTES` bytes; what an earlier row holds under the same key is replaced.
            rows: Tensors of any device, type and shape, by name.

        Raises:
            ValueError: If a key has another length, or there are not as many keys as rows.
        """
        if any(len(key) != KEY_BYTES for key in keys):
            raise ValueError(f"Every key must have {KEY_BYTES} bytes.")
        with self._own_lock():
            for key, row in zip(keys, rows, strict=True):
                if not self._writable:
                    return
                layout = layout_of(row)
                if self._buffer is not None and not self._buffer.fits(layout):
                    self._hand_over()
                if self._buffer is None:
                    self._buffer = Buffer(max(self.shard_bytes, layout.length))
                self._buffer.add(key, row, layout)

    def flush(self) -> None:
        """Wait until every row is on disk, or until the store has given up writing."""
        with self._own_lock():
            self._hand_over()
            self._changed.wait_for(lambda: not self._waiting)
            self._adopt()

    def close(self) -> None:
        """Write what is left and let go of the files; the store is empty afterwards and takes nothing more."""
        self.flush()
        with self._own_lock():
            self._writable = False
            self._shards, self._index = [], {}

    def refresh(self) -> None:
        """See what others have written since; costs one look at the folder's time when nothing has changed."""
        with self._own_lock():
            self._refreshed = time.monotonic()
            try:
                changed = os.stat(self.folder).st_mtime_ns
                if changed == self._folder_time:
                    return
                names = sorted(name for name in os.listdir(self.folder) if SHARD_NAME.fullmatch(name))
            except OSError:
                return
            # Another file may still appear within the same tick of the file system's clock.
            settled = time.time_ns() - changed > SETTLED_NANOSECONDS
            self._folder_time = changed if settled else 0
            for name in names:
                self._add(name)

    def __len__(self) -> int:
        with self._own_lock():
            buffered = {key for buffer in self._buffers() for key in buffer.numbers}
            return len(self._index) + sum(key not in self._index for key in buffered)

    def __contains__(self, key: object) -> bool:
        with self._own_lock():
            return isinstance(key, bytes) and self._find(key) is not None

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reader, (self.folder, self.limit_bytes, self.shard_bytes)

    def _own_lock(self) -> threading.Condition:
        """Return the lock of this process: in a forked child, a thread that does not exist may hold the parent's."""
        if os.getpid() != self._process:
            self._start_over()
            self._writable = False
        return self._changed

    def _start_over(self) -> None:
        """Begin with an empty buffer, no thread and a lock that nobody holds."""
        self._process = os.getpid()
        self._changed = threading.Condition(threading.RLock())
        self._buffer = None
        self._waiting = []
        self._written = []
        self._thread = None

    def _buffers(self) -> list[Buffer]:
        """Return what cannot be read from files yet, the newest first."""
        written = [buffer for _, buffer in self._written]
        return [buffer for buffer in (self._buffer, *self._waiting[::-1], *written[::-1]) if buffer is not None]

    def _find(self, key: bytes) -> tuple[Buffer | Shard, int] | None:
        for buffer in self._buffers():
            if key in buffer.numbers:
                return buffer, buffer.numbers[key]
        place = self._index.get(key)
        return None if place is None else (self._shards[place >> 32], place & 0xFFFFFFFF)

    def _add(self, name: str) -> None:
        """Take a file's rows into the index; an unreadable file is deleted, one that cannot be opened is left."""
        if name in self._names:
            return
        self._names.add(name)
        path = self.folder / name
        try:
            shard = Shard(path)
        except FileNotFoundError:
            return
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            discard(path, error)
            return
        except (OSError, RuntimeError) as error:
            # No permission, or out of memory or file handles: that says nothing about the contents.
            logger.warning("The stored teacher outputs in %s cannot be opened and are not used: %s", path, error)
            return
        # In this order, because a fork may come between any two steps.
        self._shards.append(shard)
        first = (len(self._shards) - 1) << 32
        self._index.update(zip(shard.keys(), range(first, first + len(shard.checksums)), strict=True))

    def _forget(self, key: bytes, holder: Buffer | Shard) -> None:
        """Count a damaged row as absent from now on."""
        with self._own_lock():
            place = self._index.get(key)
            if place is not None and self._shards[place >> 32] is holder:
                del self._index[key]

    def _hand_over(self) -> None:
        """Give the buffer to the background thread, and wait while too many are there already."""
        if self._buffer is None:
            return
        self._waiting.append(self._buffer)
        self._buffer = None
        if self._thread is None:
            # It ends when nothing is left to write, so a store that is dropped leaves no thread behind.
            self._thread = threading.Thread(target=self._write_waiting, name="tensor-store", daemon=True)
            self._thread.start()
        self._changed.wait_for(lambda: len(self._waiting) <= WAITING_BUFFERS)
        self._adopt()

    def _adopt(self) -> None:
        """Read from now on from files what the background thread has written."""
        for name, _ in self._written:
            self._add(name)
        self._written.clear()

    def _write_waiting(self) -> None:
        """Write buffers until none waits; runs in the background thread.

        Nothing of torch happens here, not even the end of a tensor: an interpreter that exits ends this thread
        wherever it is, and inside torch that aborts the process.
        """
        while True:
            with self._changed:
                if not self._waiting:
                    self._thread = None
                    return
                buffer = self._waiting[0]
            try:
                name = self._write_shard(buffer) if self._writable else None
            except Exception as error:  # whatever it is, nobody may wait for this thread for ever
                name = None
                self._stop_after(error)
            with self._changed:
                self._waiting.pop(0)
                if name is not None:
                    self._written.append((name, buffer))
                self._changed.notify_all()

    def _write_shard(self, buffer: Buffer) -> str | None:
        """Write one file and return its name, or None when there is no room for it."""
        parts = buffer.file_parts()
        shortage = _shortage(self.folder, sum(len(part) for part in parts), self.limit_bytes)
        if shortage is not None:
            self._stop(*shortage, ADVICE)
            return None
        name = f"rows-v1-{time.time_ns():020d}-{uuid.uuid4().hex}.safetensors"
        write_atomically(self.folder / name, parts)
        return name

    def _stop_after(self, error: Exception) -> None:
        received = f"{type(error).__name__}: {error}"
        self._stop(received, f"a folder that can be written to: {self.folder}", f"free the disk or {ADVICE}")

    def _stop(self, received: str, expected: str, todo: str) -> None:
        """Stop writing, and say so once."""
        with self._own_lock():
            if self._writable:
                self._writable = False
                self._buffer = None
                what = "The teacher's outputs are not stored any more, and training goes on without"
                logger.warning("%s", message(what, received=received, expected=expected, todo=todo))


def check_space(folder: str | os.PathLike[str], needed_bytes: int, limit_bytes: int | None) -> None:
    """Make sure, before anything starts, that what is to be stored fits below the limit and on the disk.

    Args:
        folder: Where it will be stored; need not exist yet.
        needed_bytes: Estimated size of what is still to be written, besides what the folder holds already.
        limit_bytes: Limit for the folder's total size; None for none.

    Raises:
        InputError: If it does not fit.
    """
    shortage = _shortage(Path(folder), needed_bytes, limit_bytes)
    if shortage is not None:
        what = "The teacher's outputs do not fit where they are to be stored"
        raise InputError(what, received=shortage[0], expected=shortage[1], todo=ADVICE)


def write_manifest(folder: str | os.PathLike[str], contents: Mapping[str, Any]) -> None:
    """Write a description beside the stored tensors; a reader sees the old one or the new one.

    Args:
        folder: Folder of a `TensorStore`; made when needed.
        contents: What JSON can hold.

    Raises:
        OSError: If the folder cannot be written to.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(folder) / MANIFEST, [(json.dumps(contents, indent=2, sort_keys=True) + "\n").encode()])


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return what `write_manifest` wrote, or None when it is absent or damaged.

    Args:
        folder: Folder of a `TensorStore`.
    """
    try:
        contents = json.loads((Path(folder) / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return contents if isinstance(contents, dict) else None


def _reader(folder: Path, limit_bytes: int | None, shard_bytes: int) -> TensorStore:
    """Open what another process pickled; only that one writes."""
    store = TensorStore(folder, limit_bytes=limit_bytes, shard_bytes=shard_bytes)
    store._writable = False
    return store


def _shortage(folder: Path, needed: int, limit: int | None) -> tuple[str, str] | None:
    """Return what is needed and what there is, in words, or None when there is enough."""
    if limit is not None:
        used = _folder_bytes(folder)
        if used + needed > limit:
            received = f"about {_readable(needed)} to be written, beside {_readable(used)} that {folder} holds"
            return received, f"no more than teacher_cache_limit_gb in total, that is {_readable(limit)}"
    existing = next((place for place in (folder, *folder.absolute().parents) if os.path.exists(place)), Path("."))
    disk = shutil.disk_usage(existing)
    reserve = max(RESERVE_BYTES, int(RESERVE_SHARE * disk.total))
    if needed > disk.free - reserve:
        received = f"about {_readable(needed)} to be written below {folder}"
        return received, f"no more than the {_readable(disk.free)} free on its disk, less {_readable(reserve)} reserve"
    return None


def _folder_bytes(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            # A file may go while the folder is being read.
            with contextlib.suppress(OSError):
                total += entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else 0
    return total


def _readable(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _remove_leftovers(folder: Path) -> None:
    """Remove what a crash left half written; what is younger may be another run's work."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if LEFTOVER_NAME.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    if time.time() - entry.stat().st_mtime > LEFTOVER_SECONDS:
                        os.unlink(entry.path)
