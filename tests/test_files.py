"""Files appear as a whole, replace what was there, or leave it alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_semckd.files import replacing, write_atomic


def test_the_content_replaces_an_older_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old and longer")
    assert write_atomic(target, b"new") == target
    assert target.read_bytes() == b"new" and list(tmp_path.iterdir()) == [target]


def test_until_the_end_the_older_file_is_there(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "a"
    write_atomic(target, b"old")
    with replacing(target) as temporary:
        temporary.write_bytes(b"n")
        assert temporary.parent == target.parent and temporary.name.startswith("a.")
        assert target.read_bytes() == b"old"
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new" and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("begun", [True, False])
def test_a_failure_in_the_middle_leaves_the_older_file_and_nothing_else(tmp_path: Path, begun: bool) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with pytest.raises(OSError, match="no space left"), replacing(target) as temporary:
        if begun:
            temporary.write_bytes(b"n")
        raise OSError("no space left")
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
