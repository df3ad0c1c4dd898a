"""The files of a `TensorStore`: what their bytes are, how they are gathered, mapped and checked."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

logger = logging.getLogger(__name__)

KEY_BYTES = 20

# Every tensor begins at a multiple of this, in the file and therefore in memory: a cache line.
ALIGNMENT = 64

# What a file tells about each row, besides its key.
COLUMNS = ("offsets", "lengths", "checksums", "layouts")

Row = dict[str, Tensor]

Signature = tuple[tuple[str, str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Layout:
    """How a row's tensors lie in its bytes: name, type, shape, first byte and number of bytes of each."""

    text: bytes
    fields: tuple[tuple[str, torch.dtype, tuple[int, ...], int, int], ...]
    length: int

    def views(self, blob: Tensor) -> Row:
        """Return a row's bytes as its tensors, without a copy."""
        return {
            name: blob[first : first + size].view(dtype).view(shape) for name, dtype, shape, first, size in self.fields
        }


def layout_of(row: Mapping[str, Tensor]) -> Layout:
    """Return how the tensors of a row are to lie in its bytes."""
    return _layout(
        tuple((name, str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in row.items())
    )


@functools.lru_cache(maxsize=4096)
def _layout(signature: Signature) -> Layout:
    fields = []
    length = 0
    for name, type_name, shape in signature:
        dtype = getattr(torch, type_name)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        fields.append((name, dtype, shape, length, size))
        length += _aligned(size)
    return Layout(json.dumps(signature).encode(), tuple(fields), length)


@functools.lru_cache(maxsize=4096)
def _parsed_layout(text: bytes) -> Layout:
    return _layout(tuple((name, type_name, tuple(shape)) for name, type_name, shape in json.loads(text)))


class Buffer:
    """Rows on their way to one file, already laid out as they will be there."""

    def __init__(self, capacity: int):
        # Zeros, not whatever the memory held: the gaps between tensors reach the disk too.
        self.bytes = np.zeros(capacity, dtype=np.uint8)
        self.used = 0
        self.rows: list[tuple[bytes, Layout, int]] = []
        self.numbers: dict[bytes, int] = {}

    def fits(self, layout: Layout) -> bool:
        """Tell whether there is room for one more row."""
        return self.used + layout.length <= len(self.bytes)

    def add(self, key: bytes, row: Mapping[str, Tensor], layout: Layout) -> None:
        """Copy a row to behind the others."""
        for name, view in self._views(layout, self.used).items():
            view.copy_(row[name].detach())
        self.rows.append((key, layout, self.used))
        self.used += layout.length
        self.numbers[key] = len(self.rows) - 1

    def row(self, number: int) -> Row:
        """Return copies: what a caller does to them must not reach the disk."""
        _, layout, first = self.rows[number]
        return {name: view.clone() for name, view in self._views(layout, first).items()}

    def _views(self, layout: Layout, first: int) -> Row:
        return layout.views(torch.from_numpy(self.bytes[first : first + layout.length]))

    def file_parts(self) -> list[bytes | memoryview]:
        """Return the bytes of a safetensors file, piece by piece.

        The header is composed here because `safetensors.save_file` neither aligns to more than eight bytes nor
        flushes to the disk, and because it would copy the rows once more.
        """
        contents = self.bytes[: self.used]
        texts = list(dict.fromkeys(layout.text for _, layout, _ in self.rows))
        numbers = {text: number for number, text in enumerate(texts)}
        table = [
            (
                first,
                layout.length,
                _checksum(key, layout.text, contents[first : first + layout.length].data),
                numbers[layout.text],
            )
            for key, layout, first in self.rows
        ]
        columns = np.ascontiguousarray(np.array(table, dtype=np.int64).T)
        keys = np.frombuffer(b"".join(key for key, _, _ in self.rows), dtype=np.uint8).reshape(-1, KEY_BYTES)
        # Rows first and keys last, so that everything is aligned to its own type.
        arrays = {"rows": contents, **dict(zip(COLUMNS, columns, strict=True)), "keys": keys}
        header: dict[str, Any] = {"__metadata__": {"layouts": json.dumps([text.decode() for text in texts])}}
        end = 0
        for name, array in arrays.items():
            kind = "U8" if array.dtype == np.uint8 else "I64"
            header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
            end += array.nbytes
        encoded = json.dumps(header).encode()
        encoded = encoded.ljust(_aligned(8 + len(encoded)) - 8)
        pieces = [memoryview(array.reshape(-1).view(np.uint8)) for array in arrays.values()]
        return [len(encoded).to_bytes(8, "little"), encoded, *pieces]


class Shard:
    """One file, mapped into memory; opening it reads the header and the keys."""

    def __init__(self, path: Path):
        self.path = path
        with safe_open(path, framework="pt") as file:
            self.texts = [text.encode() for text in json.loads(file.metadata()["layouts"])]
            # On the CPU this is a view of the mapped file, which outlives the `with`.
            self.bytes: Tensor = file.get_tensor("rows")
            self._keys = file.get_tensor("keys").numpy()
            columns = [file.get_tensor(name).numpy() for name in COLUMNS]
        count = len(self._keys)
        kinds = [(column.shape, column.dtype) for column in columns]
        if kinds != [((count,), np.int64)] * len(COLUMNS) or self._keys.shape != (count, KEY_BYTES):
            raise ValueError("its tables do not fit together")
        if self.bytes.dtype != torch.uint8 or self._keys.dtype != np.uint8:
            raise ValueError("its tensors are of another type")
        self.offsets, self.lengths, self.checksums, self.layouts = columns
        self.size = os.stat(path).st_size
        self.verified = bytearray(count)
        self.damaged = False
        self.lost = False

    def keys(self) -> list[bytes]:
        """Return the rows' keys, in the order of the rows."""
        joined = self._keys.tobytes()
        return [joined[first : first + KEY_BYTES] for first in range(0, len(joined), KEY_BYTES)]

    def row(self, number: int) -> Row | None:
        """Return views of the mapped file, or None when the row is damaged."""
        if not self._whole():
            return None
        first, length, layout = int(self.offsets[number]), int(self.lengths[number]), int(self.layouts[number])
        # Once a process: the checksum takes longer than all the rest.
        if not self.verified[number]:
            if not self._undamaged(number, first, length, layout):
                if not self.damaged:
                    logger.warning("Stored teacher outputs in %s are damaged and are made again.", self.path)
                self.damaged = True
                return None
            self.verified[number] = True
        return _parsed_layout(self.texts[layout]).views(self.bytes[first : first + length])

    def _whole(self) -> bool:
        """Tell whether the file still has its size: to touch what was cut off would kill the process."""
        try:
            if not self.lost and os.stat(self.path).st_size < self.size:
                self.lost = True
                discard(self.path, "it was cut off")
        except OSError:
            # Deleted by somebody: the map stays valid.
            pass
        return not self.lost

    def _undamaged(self, number: int, first: int, length: int, layout: int) -> bool:
        if not 0 <= layout < len(self.texts):
            return False
        # An array, because its slices stop at the end whatever a damaged table says.
        blob = self.bytes.numpy()[first : first + length].data
        key = self._keys[number].tobytes()
        return _checksum(key, self.texts[layout], blob) == int(self.checksums[number])


def discard(path: Path, reason: object) -> None:
    """Delete a file that cannot be read, and say why; in a folder that is read-only it stays."""
    logger.warning("Stored teacher outputs in %s are unreadable, deleted and made again: %s", path, reason)
    # A read-only folder keeps its file; every run ignores it.
    with contextlib.suppress(OSError):
        path.unlink()


def _checksum(key: bytes, layout: bytes, blob: memoryview) -> int:
    """Cover all that makes a row: the same bytes under another key or in another shape are damage too."""
    return zlib.crc32(blob, zlib.crc32(layout, zlib.crc32(key)))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
