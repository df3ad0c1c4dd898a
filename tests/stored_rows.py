"""Rows to store, and what a folder holds of them."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_semckd.teacher.cache.store import TensorStore

WARNING = "not stored any more"


def key_of(number: int) -> bytes:
    return number.to_bytes(20, "big")


def row_of(number: int, width: int = 100) -> dict[str, Tensor]:
    return {"logits": torch.arange(width, dtype=torch.float32) + number, "count": torch.tensor(number)}


def same(got: dict[str, Tensor] | None, expected: dict[str, Tensor]) -> bool:
    if got is None or list(got) != list(expected):
        return False
    return all(
        got[name].dtype == value.dtype and got[name].shape == value.shape and bits(got[name]) == bits(value)
        for name, value in expected.items()
    )


def bits(value: Tensor) -> bytes:
    return value.resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def filled(folder: Path, count: int = 6, **settings: int) -> list[Path]:
    """Write rows 0, 1, ... and return the files."""
    with closing(TensorStore(folder, **settings)) as store:
        store.write([key_of(number) for number in range(count)], [row_of(number) for number in range(count)])
    return shards(folder)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrow"))


def flip(path: Path, position: int, mask: int = 1) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= mask
    path.write_bytes(raw)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
