"""scripts/accuracy/parallel.py: several processes leave the rows of one."""

from __future__ import annotations

from pathlib import Path

import pytest
from accuracy.rows import key_of, read_rows
from accuracy_cases import write_protocol
from benchmark_accuracy import run_protocol


@pytest.mark.slow
def test_runs_of_several_processes_leave_the_rows_of_one(ran, tmp_path: Path) -> None:
    path = tmp_path / "tiny.jsonl"
    run_protocol(str(write_protocol(tmp_path)), "tiny", None, tmp_path, jobs=2, outputs=tmp_path / "outputs")
    rows = read_rows(path)
    assert len(path.read_text().splitlines()) == len(rows) == len(ran.rows)
    assert {key_of(row): row["value"] for row in rows} == {key_of(row): row["value"] for row in ran.rows}
