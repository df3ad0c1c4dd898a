"""Tensors of many samples in a folder of shards, which several runs read and write."""

import contextlib
import functools
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from ...errors import InputError
from ...files import replacing
from .shard import KEY_BYTES, Buffer, Row, Shard, open_shard, row_bytes, write

logger = logging.getLogger(__name__)
SHARD_BYTES = 64 * 2**20
# The version of the format is part of the name, so that files of another version are foreign and left alone. The
# time comes next: of two rows with one key, the one in the file that sorts last counts.
SHARD_NAME = re.compile(r"rows-v2-\d{20}-[0-9a-f]{32}\.arrow")
LEFTOVER_NAME = re.compile(r"rows-v2-.*\.[0-9a-f]{32}\.partial")
# What is younger may be another run's work.
LEFTOVER_SECONDS = 24 * 3600
# Full buffers that may wait for the disk before `write` waits too.
WAITING_BUFFERS = 2
REFRESH_SECONDS = 1.0
# What a store leaves free on its disk: checkpoints and everybody else's files need room too.
RESERVE_BYTES = 2**30
RESERVE_SHARE = 0.02
ADVICE = (
    'lower max_tokens, name fewer teacher_layers, set teacher_cache_dtype="float16", raise '
    "teacher_cache_limit_gb, or choose a folder on another disk."
)


class TensorStore:
    """Per-sample tensors, each sample under a key, in memory-mapped Arrow files that several runs may share.

    Rows are gathered and written by a background thread, a file at a time. A file appears by renaming, so a reader
    never sees half of one; what is damaged nevertheless counts as absent and is written again. A disk that is full,
    limited or read-only ends the storing with one warning, never the training. Copies that arrive in another process,
    by pickling or by a fork, only read.

    The folder is made when needed, and takes at most `limit_bytes` (None: what the disk can spare). A file has
    `shard_bytes`; a larger row gets one of its own.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, limit_bytes: int | None = None, shard_bytes: int = SHARD_BYTES
    ):
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes
        self.shard_bytes = shard_bytes
        self._shards: list[Shard] = []
        # Key -> number of the shard in the upper half, number of the row in the lower: an int is small, and there
        # may be millions.
        self._index: dict[bytes, int] = {}
        self._names: set[str] = set()
        self._refreshed = 0.0
        self._writable = True
        self._start_over()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._stop(error)
        # What a crash left half written.
        for path in self.folder.glob("*.partial"):
            with contextlib.suppress(OSError):
                if LEFTOVER_NAME.fullmatch(path.name) and time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                    path.unlink()
        self.refresh()

    @property
    def writable(self) -> bool:
        """Whether rows are still taken: a full, limited or read-only disk ends that."""
        with self._locked():
            return self._writable

    def read(self, keys: Sequence[bytes]) -> list[Row | None]:
        """Return each key's tensors on the CPU, or None where they are absent or damaged.

        The tensors are views of mapped files: clone or stack them before changing them in place.
        """
        with self._locked():
            rows = [self._row(key) for key in keys]
            if None in rows and time.monotonic() - self._refreshed > REFRESH_SECONDS:
                self.refresh()
                rows = [self._row(key) if row is None else row for key, row in zip(keys, rows, strict=True)]
            return rows

    def write(self, keys: Sequence[bytes], rows: Sequence[Mapping[str, Tensor]]) -> None:
        """Take over copies of rows, in place of earlier ones with the same keys (of `KEY_BYTES` bytes).

        They can be read at once and reach the disk in the background.
        """
        if any(len(key) != KEY_BYTES for key in keys):
            raise ValueError(f"Every key must have {KEY_BYTES} bytes.")
        with self._locked():
            for key, row in zip(keys, rows, strict=True):
                if self._filling.size + row_bytes(row) > self.shard_bytes:
                    self._hand_over()
                if not self._writable:
                    return
                self._filling.add(key, row)
            backlog = [future for _, future in self._writing[:-WAITING_BUFFERS]]
        # Outside the lock, so that others read meanwhile.
        wait(backlog)

    def flush(self) -> None:
        """Wait until every row is on disk, or until the store has given up writing."""
        with self._locked():
            self._hand_over()
            writing = [future for _, future in self._writing]
        wait(writing)
        with self._locked():
            pass

    def close(self) -> None:
        """Write what is left and unmap the files; the store is empty afterwards and takes nothing more."""
        self.flush()
        with self._locked():
            self._writable = False
            self._shards, self._index = [], {}

    def refresh(self) -> None:
        """Open the shards that others have written since."""
        with self._locked():
            self._refreshed = time.monotonic()
            with contextlib.suppress(OSError):
                for name in sorted(set(os.listdir(self.folder)) - self._names):
                    if SHARD_NAME.fullmatch(name):
                        self._add(name)

    def __len__(self) -> int:
        with self._locked():
            return len(set(self._index).union(*(buffer.rows for buffer in self._pending())))

    def __reduce__(self) -> tuple[Any, ...]:
        opening = functools.partial(TensorStore, limit_bytes=self.limit_bytes, shard_bytes=self.shard_bytes)
        # Only the process that pickles writes.
        return opening, (self.folder,), {"_writable": False}

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock, after taking in what the background thread has written."""
        # In a forked child, a thread that does not exist there may hold the parent's lock.
        if os.getpid() != self._process:
            self._start_over()
            self._writable = False
        with self._lock:
            self._adopt()
            yield

    def _start_over(self) -> None:
        """Begin with nothing to write, no thread, and a lock that nobody holds."""
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._executor: ThreadPoolExecutor | None = None
        self._filling = Buffer()
        # What is being written, and the name of its file when it is; the oldest first.
        self._writing: list[tuple[Buffer, Future[str]]] = []

    def _pending(self) -> list[Buffer]:
        """Return the rows that cannot be read from files yet, the newest first."""
        return [self._filling, *(buffer for buffer, _ in reversed(self._writing))]

    def _row(self, key: bytes) -> Row | None:
        for buffer in self._pending():
            if key in buffer.rows:
                return buffer.row(key)
        place = self._index.get(key)
        row = None if place is None else self._shards[place >> 32].row(place & 0xFFFFFFFF)
        if row is None:
            self._index.pop(key, None)
        return row

    def _hand_over(self) -> None:
        """Let the background thread write what is gathered."""
        if not self._filling.rows:
            return
        # The thread ends with the store; an interpreter that exits waits until it has written what it was given.
        self._executor = self._executor or ThreadPoolExecutor(1, thread_name_prefix="tensor-store")
        try:
            future = self._executor.submit(_write_shard, self.folder, self._filling, self.limit_bytes)
            self._writing.append((self._filling, future))
        except RuntimeError as error:  # the interpreter is exiting
            self._stop(error)
        self._filling = Buffer()

    def _adopt(self) -> None:
        """Read from files what the background thread has written."""
        while self._writing and self._writing[0][1].done():
            _, future = self._writing.pop(0)
            error = future.exception()
            if error is None:
                self._add(future.result())
            else:
                self._stop(error)

    def _add(self, name: str) -> None:
        """Take the rows of a file into the index."""
        if name in self._names:
            return
        self._names.add(name)
        shard = open_shard(self.folder / name)
        if shard is not None:
            first = len(self._shards) << 32
            # In this order, because a fork may come between the two.
            self._shards.append(shard)
            self._index.update(zip(shard.keys, range(first, first + len(shard.keys)), strict=True))

    def _stop(self, error: BaseException) -> None:
        """Stop writing, and say so once."""
        if not self._writable:
            return
        self._writable = False
        self._filling = Buffer()
        if not isinstance(error, InputError):
            error = InputError(
                "A file cannot be written",
                received=f"{type(error).__name__}: {error}",
                expected=f"a folder that can be written to: {self.folder}",
                todo=f"free the disk or {ADVICE}",
            )
        logger.warning("The teacher's outputs are not stored any more, and training goes on without. %s", error)


def _write_shard(folder: Path, buffer: Buffer, limit_bytes: int | None) -> str:
    """Write a file and return its name."""
    batch, counter = buffer.batch(), pa.MockOutputStream()
    write(batch, counter)
    check_space(folder, counter.size(), limit_bytes)
    name = f"rows-v2-{time.time_ns():020d}-{uuid.uuid4().hex}.arrow"
    with replacing(folder / name) as temporary, pa.OSFile(str(temporary), "wb") as file:
        write(batch, file)
    return name


def check_space(folder: str | os.PathLike[str], needed_bytes: int, limit_bytes: int | None) -> None:
    """Raise `InputError` unless what is still to be written fits on the disk and, with the rest, below the limit."""
    folder = Path(folder)
    existing = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    disk = shutil.disk_usage(existing)
    reserve = max(RESERVE_BYTES, int(RESERVE_SHARE * disk.total))
    if limit_bytes is not None and (used := _folder_bytes(folder)) + needed_bytes > limit_bytes:
        received = f"about {_readable(needed_bytes)} to be written, beside {_readable(used)} that {folder} holds"
        expected = f"no more than teacher_cache_limit_gb in total, that is {_readable(limit_bytes)}"
    elif needed_bytes > disk.free - reserve:
        received = f"about {_readable(needed_bytes)} to be written below {folder}"
        expected = f"no more than the {_readable(disk.free)} free on its disk, less {_readable(reserve)} reserve"
    else:
        return
    what = "The teacher's outputs do not fit where they are to be stored"
    raise InputError(what, received=received, expected=expected, todo=ADVICE)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        # A file may go while the folder is being read.
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _readable(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
