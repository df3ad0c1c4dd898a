"""Files appear as a whole, replace what was there, or leave it alone."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_semckd.errors import InputError
from hf_semckd.files import replacing, write_atomic, write_json


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


@dataclasses.dataclass
class Row:
    name: str
    parameters: int
    metric: float | None
    seconds: float | None


def test_json_of_arrays_tensors_and_dataclasses(tmp_path):
    payload = {
        "row": Row("ä", 3, None, 0.5),
        "array": np.arange(4, dtype=np.float32).reshape(2, 2),
        "scalars": (np.int64(7), np.float64(0.25), np.bool_(True), torch.tensor(2)),
        "tensor": torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
        5: [],
    }
    path = write_json(tmp_path / "new" / "report.json", payload)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {
        "row": {"name": "ä", "parameters": 3, "metric": None, "seconds": 0.5},
        "array": [[0.0, 1.0], [2.0, 3.0]],
        "scalars": [7, 0.25, True, 2],
        "tensor": [1.0, 1.0],
        "5": [],
    }
    assert "ä" in text and text.endswith("}\n")


def test_json_has_null_for_what_is_no_number(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    payload = {"a": math.nan, "b": [np.float32("inf")], "c": np.array([1, np.nan]), "d": torch.tensor(-math.inf)}
    text = write_json(tmp_path / "report.json", payload).read_text()
    assert json.loads(text, parse_constant=refuse) == {"a": None, "b": [None], "c": [1.0, None], "d": None}


@pytest.mark.parametrize(
    ("payload", "place"),
    [
        ({"a": [0, {"b": Path("x")}]}, r"payload\['a'\]\[1\]\['b'\]"),
        ({"a": {(1, 2): 0}}, r"payload\['a'\]"),
        ([1j], r"payload\[0\]"),
        ([Row], r"payload\[0\]"),
    ],
)
def test_json_refuses_other_types_and_tells_the_place(tmp_path, payload, place):
    target = tmp_path / "report.json"
    target.write_text("old")
    with pytest.raises(InputError, match=place):
        write_json(target, payload)
    assert target.read_text() == "old"


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, function):
    def fail(*arguments):
        raise OSError("disk full")

    target = tmp_path / "report.json"
    target.write_text("old")
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(target, {"new": 1})
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_the_new_file_appears_whole(tmp_path, monkeypatch):
    target, replace = tmp_path / "file.bin", os.replace
    seen = []

    def watch(source, destination):
        seen.append((target.exists(), Path(source).read_bytes(), Path(source).parent == tmp_path))
        replace(source, destination)

    monkeypatch.setattr(os, "replace", watch)
    assert write_atomic(target, b"content") == target
    assert seen == [(False, b"content", True)]
    assert target.read_bytes() == b"content"


@pytest.mark.skipif(os.name != "posix", reason="modes are a matter of POSIX systems")
def test_a_written_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "ordinary").write_bytes(b"")
    write_atomic(tmp_path / "atomic", b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "atomic")]
    assert modes[0] == modes[1]
