"""The format of a shard: an Arrow IPC file of one record batch, memory-mapped and checked."""

import contextlib
import functools
import json
import logging
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

logger = logging.getLogger(__name__)
KEY_BYTES = 20
# Arrow aligns the buffers of a file to 8 bytes; aligned alike within a row, so is every tensor.
ALIGNMENT = 8
# `row` holds the bytes of a row's tensors, one after the other, and `layout` their names, types and shapes as JSON.
SCHEMA = pa.schema(
    {
        "key": pa.binary(KEY_BYTES),
        "layout": pa.dictionary(pa.int32(), pa.string()),
        "checksum": pa.uint32(),
        "row": pa.large_binary(),
    }
)
# A key, an index into the layouts, a checksum and an offset.
ROW_OVERHEAD = KEY_BYTES + 4 + 4 + 8
Row = dict[str, Tensor]


@dataclass(eq=False)
class Buffer:
    """Copies of the rows of a shard that is not written yet, and how many bytes they will take."""

    rows: dict[bytes, Row] = field(default_factory=dict)
    size: int = 0

    def add(self, key: bytes, row: Mapping[str, Tensor]) -> None:
        """Copy a row; it takes the place of an earlier one with the same key."""
        self.rows[key] = {name: value.detach().to("cpu", copy=True) for name, value in row.items()}
        self.size += row_bytes(row)

    def row(self, key: bytes) -> Row:
        """Return a copy: what a caller does to it must not reach the disk."""
        return {name: value.clone() for name, value in self.rows[key].items()}

    def batch(self) -> pa.RecordBatch:
        """Return what the shard is to hold."""
        layouts, contents = [], []
        for row in self.rows.values():
            layout = [(name, str(value.dtype).removeprefix("torch."), value.shape) for name, value in row.items()]
            layouts.append(json.dumps(layout))
            contents.append(b"".join(map(_content, row.values())))
        keys = list(self.rows)
        checksums = list(map(_checksum, keys, layouts, contents))
        columns = {"key": keys, "layout": layouts, "checksum": checksums, "row": contents}
        return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


class Shard:
    """A mapped file, of which all but the rows is read at once; see `open_shard`."""

    def __init__(self, path: Path, mapped: np.ndarray):
        self._path = path
        self._size = mapped.size
        reader = pa.ipc.open_file(pa.py_buffer(mapped))
        if reader.num_record_batches != 1 or not reader.schema.equals(SCHEMA):
            raise ValueError("it has another schema")
        batch = reader.get_batch(0)
        # Of the rows this checks only that they lie inside the file.
        batch.validate(full=True)
        keys, layouts, checksums, rows = batch.columns
        self.keys: list[bytes] = np.frombuffer(keys.buffers()[1], f"V{KEY_BYTES}", len(batch)).tolist()
        self._layouts: list[str] = layouts.dictionary.to_pylist()
        self._layout_numbers = layouts.indices.to_numpy()
        self._checksums = checksums.to_numpy()
        _, ends, values = rows.buffers()
        self._ends = np.frombuffer(ends, np.int64, len(batch) + 1)
        # A slice of the map, found by its address: Arrow's own buffer is read-only, which tensors cannot be.
        first = values.address - mapped.ctypes.data
        # An empty one is anywhere.
        if values.size and not 0 <= first <= mapped.size - values.size:
            raise ValueError("it is compressed")
        self._data = mapped[first : first + values.size]
        self._verified = bytearray(len(batch))
        self._damaged = False
        self._cut_off = False

    def row(self, number: int) -> Row | None:
        """Return views of the mapped file, or None when the row is damaged."""
        if not self._whole():
            return None
        layout = self._layouts[self._layout_numbers[number]]
        first, last = self._ends[number : number + 2].tolist()
        # Once a process: the checksum takes longer than all the rest.
        if not self._verified[number]:
            if _checksum(self.keys[number], layout, self._data[first:last].data) != self._checksums[number]:
                self._report_damage()
                return None
            self._verified[number] = True
        fields = _fields(layout)
        # A checksum can be made up, too.
        if fields is None or sum(_aligned(size) for *_, size in fields) != last - first:
            self._report_damage()
            return None
        views = {}
        for name, dtype, shape, offset, size in fields:
            start = first + offset
            views[name] = torch.from_numpy(self._data[start : start + size]).view(dtype).view(shape)
        return views

    def _report_damage(self) -> None:
        """Say once that rows are damaged."""
        if not self._damaged:
            logger.warning("Stored teacher outputs in %s are damaged and are made again.", self._path)
        self._damaged = True

    def _whole(self) -> bool:
        """Tell whether the file still has its size: to touch what was cut off would kill the process."""
        # Of a file that somebody deleted the map stays valid.
        with contextlib.suppress(OSError):
            if not self._cut_off and os.stat(self._path).st_size < self._size:
                self._cut_off = True
                _discard(self._path, "it was cut off")
        return not self._cut_off


def open_shard(path: Path) -> Shard | None:
    """Map a file into memory, or return None where that fails; a damaged one is deleted."""
    try:
        # A private map: whoever changes a row in place changes a copy. Arrow's own map would end the process.
        mapped = torch.from_file(str(path), shared=False, size=os.stat(path).st_size, dtype=torch.uint8).numpy()
    except (OSError, RuntimeError) as error:
        # No permission, or out of memory or file handles: that says nothing about the contents.
        logger.warning("The stored teacher outputs in %s cannot be opened and are not used: %s", path, error)
        return None
    try:
        return Shard(path, mapped)
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        _discard(path, error)
        return None


def write(batch: pa.RecordBatch, sink: pa.NativeFile) -> None:
    """Write a shard; without the interpreter's lock, so that training goes on."""
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(batch)


def row_bytes(row: Mapping[str, Tensor]) -> int:
    """Return how many bytes a row takes in a shard."""
    return ROW_OVERHEAD + sum(_aligned(value.nbytes) for value in row.values())


def _discard(path: Path, reason: object) -> None:
    """Delete a shard that cannot be read; in a read-only folder it stays, and every run ignores it."""
    logger.warning("Stored teacher outputs in %s are unreadable, deleted and made again: %s", path, reason)
    with contextlib.suppress(OSError):
        path.unlink()


@functools.lru_cache(maxsize=4096)
def _fields(layout: str) -> tuple[tuple[str, torch.dtype, tuple[int, ...], int, int], ...] | None:
    """Return name, type, shape, first byte and number of bytes of each tensor; None where it is no layout."""
    fields, offset = [], 0
    try:
        entries = [
            (str(name), getattr(torch, type_name), tuple(shape)) for name, type_name, shape in json.loads(layout)
        ]
    except (ValueError, TypeError, AttributeError):
        return None
    for name, dtype, shape in entries:
        if not isinstance(dtype, torch.dtype) or not all(type(size) is int and size >= 0 for size in shape):
            return None
        size = math.prod(shape) * dtype.itemsize
        fields.append((name, dtype, shape, offset, size))
        offset += _aligned(size)
    return tuple(fields)


def _content(value: Tensor) -> bytes:
    """Return the bytes of a tensor, filled up so that the next one is aligned."""
    data: bytes = value.resolve_conj().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data.ljust(_aligned(len(data)), b"\0")


def _checksum(key: bytes, layout: str, content: bytes | memoryview) -> int:
    """Cover all that makes a row: the same bytes under another key or in another shape are damage too."""
    return zlib.crc32(content, zlib.crc32(layout.encode(), zlib.crc32(key)))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
