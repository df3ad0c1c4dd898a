"""Files appear as a whole, replace what was there, or leave it alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_semckd.files import write_atomically


def test_the_pieces_replace_an_older_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old and longer")
    write_atomically(target, [b"ne", memoryview(b"w")])
    assert target.read_bytes() == b"new" and list(tmp_path.iterdir()) == [target]


def test_a_failure_in_the_middle_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")

    def broken():
        yield b"n"
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(target, broken())
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
