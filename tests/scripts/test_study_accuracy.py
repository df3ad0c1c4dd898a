"""scripts/study_accuracy.py: the command shows what the kept rows tell, and runs what a study needs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import study_accuracy
from accuracy.protocol import read_protocols
from accuracy_cases import PROTOCOLS, row


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: Any) -> None:
    places = ["--results", str(folder), "--pictures", str(folder / "pictures")]
    monkeypatch.setattr(sys, "argv", ["study_accuracy.py", *map(str, words), *places])
    study_accuracy.main()


def store(folder: Path, rows: list[dict[str, Any]]) -> None:
    for entry in rows:
        with open(folder / f"{entry['protocol']}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def test_the_command_shows_a_map_of_kept_rows(monkeypatch, tmp_path, capsys):
    pairs = [row("negative_map", "pair-3-6", 0, 0.4, extras={"mismatch": 1.25})]
    store(tmp_path, [row("negative_map", "kd", 0, 0.5), *pairs])
    path = PROTOCOLS / "negative_map.yaml"
    call(monkeypatch, tmp_path, "negative-map", path, "--table-only")
    assert "-10.00 (n = 1)" in capsys.readouterr().out
    assert (tmp_path / "pictures" / "negative_map.png").is_file()
    call(monkeypatch, tmp_path, "mismatch", path, PROTOCOLS / "methods.yaml", "--table-only")
    assert "| pair-3-6 |" in capsys.readouterr().out


def test_the_command_shows_curves_of_kept_rows(monkeypatch, tmp_path, capsys):
    path = PROTOCOLS / "few_labels.yaml"
    store(tmp_path, [row(entry.name, "kd", 0, 0.5) for entry in read_protocols(path)])
    call(monkeypatch, tmp_path, "curve", path, "--table-only")
    assert "labeled training samples" in capsys.readouterr().out
    assert (tmp_path / "pictures" / "few_labels.png").is_file()


def test_the_command_shows_the_association_of_kept_rows(monkeypatch, tmp_path, capsys):
    kept = [[[0.9, 0.1], [0.3, 0.7]], [[0.7, 0.3], [0.1, 0.9]]]
    rows = [row("vit_fashion", "semckd", seed, 0.5, extras={"association": kept[seed]}) for seed in (0, 1)]
    others = [
        row("vit_fashion", "semckd", 100, 0.5, split="tuning", extras={"association": [[0, 1], [0, 1]]}),
        row("vit_fashion", "semckd-uniform", 0, 0.5, extras={"association": [[0, 1], [0, 1]]}),
        row("vit_fashion", "semckd", 2, 0.5),
    ]
    store(tmp_path, [*rows, *others])
    call(monkeypatch, tmp_path, "association", PROTOCOLS / "vit_fashion.yaml", "--table-only")
    out = capsys.readouterr().out
    assert (
        "vit_fashion, mean of 2 seeds" in out and "| student 1 | 80 | 20 |" in out and "| student 2 | 20 | 80 |" in out
    )
    assert (tmp_path / "pictures" / "association_vit_fashion.png").is_file()
    with pytest.raises(SystemExit, match="no association of deep_vit_fashion yet"):
        call(monkeypatch, tmp_path, "association", PROTOCOLS / "deep_vit_fashion.yaml", "--table-only")


def test_the_command_says_what_is_missing(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="no map of negative_map yet"):
        call(monkeypatch, tmp_path, "negative-map", PROTOCOLS / "negative_map.yaml", "--table-only")
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path, "curve", PROTOCOLS / "vit_fashion.yaml", "--table-only")


def test_the_command_runs_only_what_a_study_needs(monkeypatch, tmp_path):
    path, runs = PROTOCOLS / "few_labels.yaml", []
    monkeypatch.setattr(
        study_accuracy, "run_protocol", lambda path, name, methods, results: runs.append((name, methods))
    )
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path, "mismatch", path)
    assert runs == [(entry.name, ["semckd"]) for entry in read_protocols(path)]
