"""scripts/benchmark_accuracy.py: the command, of rows that are there and from the start."""

from __future__ import annotations

import json
import sys
from typing import Any

import benchmark_accuracy
import pytest
from accuracy.protocol import read_protocols
from accuracy.rows import read_rows
from accuracy_cases import PROTOCOLS, row, write_protocol
from launching import ROOT, python


def call(monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_accuracy.py", *map(str, words)])
    benchmark_accuracy.main()


def test_the_tables_of_the_kept_rows_are_printed(monkeypatch, tmp_path, capsys):
    """A pattern of protocols names the file of the methods too."""
    path = write_protocol(tmp_path)
    values = {"student": 0.5, "kd": 0.6, "semckd": 0.7}
    (tmp_path / "tiny.jsonl").write_text(
        "".join(f"{json.dumps(row('tiny', name, seed, value))}\n" for name, value in values.items() for seed in (0, 1))
    )
    call(
        monkeypatch,
        path,
        PROTOCOLS / "methods.yaml",
        "--results",
        tmp_path,
        "--table-only",
        "--methods",
        "kd",
        "semckd",
    )
    out = capsys.readouterr().out
    assert "| method | tiny | ARI |" in out and "| kd | 60.00 ± 0.00 ▼ |" in out and "semckd is more accurate" in out
    assert "| semckd-tuned |" not in out


@pytest.mark.parametrize(
    ("words", "said"), [((), "name one or more protocol files"), (("--methods", "kdd"), "no protocol compares kdd")]
)
def test_a_wrong_argument_is_named(monkeypatch, tmp_path, capsys, words, said):
    with pytest.raises(SystemExit):
        call(monkeypatch, *([write_protocol(tmp_path)] if words else []), *words)
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_smoke_protocol_from_start_to_table(tmp_path):
    path = PROTOCOLS / "smoke.yaml"
    done = python(ROOT / "scripts" / "benchmark_accuracy.py", path, "--results", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (protocol,) = read_protocols(path)
    rows = read_rows(tmp_path / "smoke.jsonl")
    tested = {(row["method"], row["seed"]) for row in rows if row["split"] == "test"}
    names = [method.name for method in protocol.methods]
    assert tested == {("teacher", 0)} | {(name, seed) for name in names for seed in protocol.test_seeds}
    assert "| method | smoke | ARI |" in done.stdout
    for name in ("teacher", *names):
        assert f"| {name} | " in done.stdout
