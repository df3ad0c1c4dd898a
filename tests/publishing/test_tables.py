import dataclasses
import getpass
import json
import math
import os
import platform
import stat
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_semckd.errors import InputError
from hf_semckd.files import write_atomic, write_json
from hf_semckd.publishing.environment import environment
from hf_semckd.publishing.plots import validate_association
from hf_semckd.publishing.tables import format_markdown_table, format_table


@pytest.mark.parametrize(
    ("association", "received"),
    [
        (np.full((2, 3, 4), 0.25), r"\(2, 3, 4\)"),
        (np.full(4, 0.25), r"\(4,\)"),
        (np.zeros((0, 4)), r"\(0, 4\)"),
        (np.array([[0.5, np.nan]]), "1 NaN or infinite"),
        (np.array([[np.inf, -np.inf]]), "2 NaN or infinite"),
        (np.array([[1.5, -0.5]]), "from -0.5 to 1.5"),
    ],
)
def test_what_are_no_weights_is_refused(association, received):
    with pytest.raises(ValueError, match=f"received: .*{received}(.|\n)*expected: (.|\n)*what to do: "):
        validate_association(association)


def test_validation_copies_and_clips_what_rounding_left_over():
    weights = np.array([[1.004, -0.004], [0.0, 1.0]])
    checked = validate_association(weights)
    np.testing.assert_array_equal(checked, np.eye(2))
    checked[0, 0] = 0.5
    assert weights[0, 0] == 1.004


@dataclasses.dataclass
class Row:
    name: str
    parameters: int
    metric: float | None
    seconds: float | None


ROWS = [
    dataclasses.asdict(Row("teacher", 86_567_656, 0.96875, None)),
    dataclasses.asdict(Row("student, SemCKD", np.int64(5_526_346), np.float32(0.5), 1234.56)),
]


def test_text_table():
    expected = """\
name             parameters  metric  seconds
---------------  ----------  ------  -------
teacher          86,567,656  0.9688        -
student, SemCKD   5,526,346  0.5000  1,234.6"""
    assert format_table(ROWS, ["name", "parameters", "metric", "seconds"]) == expected


def test_markdown_table():
    rows = [{"name": "a|b", "ok": True, "value": 1e-5}, {"name": "two\nlines", "value": math.nan}]
    expected = """\
| name | ok | value |
|---|---|---:|
| a\\|b | True | 1.00e-05 |
| two lines | - | nan |"""
    assert format_markdown_table(rows, ["name", "ok", "value"]) == expected


def test_tables_without_rows_keep_their_headings():
    assert format_table([], ["name", "value"]) == "name  value\n----  -----"
    assert format_markdown_table([], ["name"]) == "| name |\n|---|"


@pytest.mark.parametrize("table", [format_table, format_markdown_table])
def test_tables_refuse_columns_that_nothing_fills(table):
    with pytest.raises(InputError, match="received: metrics\n.*name, parameters"):
        table([{"name": "a", "parameters": 1}], ["name", "metrics"])
    with pytest.raises(InputError, match="at least one"):
        table([{"name": "a"}], [])


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


def test_environment_tells_versions_and_no_identity(tmp_path):
    record = environment()
    assert record["torch"] == torch.__version__
    assert record["python"] == ".".join(map(str, os.sys.version_info[:3]))
    assert set(record) == {
        *("python", "torch", "transformers", "accelerate", "hf_semckd"),
        *("platform", "cpu_count", "torch_threads", "accelerator"),
    }
    text = write_json(tmp_path / "environment.json", record).read_text()
    words = set(text.replace('"', " ").replace(",", " ").split())
    # As whole words: a host that is called "x" would otherwise be found in "x86_64".
    assert not words & {platform.node(), getpass.getuser(), str(Path.home()), os.getcwd()}
    assert "/" not in text and platform.release() not in text


def test_environment_without_a_distribution(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert environment()["accelerate"] is None
