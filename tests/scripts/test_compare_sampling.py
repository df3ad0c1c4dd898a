"""scripts/compare_sampling.py: a line of the table by hand, and a tiny protocol from start to rows."""

from __future__ import annotations

import json
from dataclasses import replace

import compare_sampling
import pytest
from accuracy.data import load_splits

VIT = {"family": "vit", "size": 8, "patch": 4, "width": 24}
ARGS = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3}


def rows(**accuracies: list[float]) -> list[dict[str, object]]:
    return [
        {"variant": variant, "seed": seed, "accuracy": value}
        for variant, values in accuracies.items()
        for seed, value in enumerate(values)
    ]


def test_a_line_by_hand():
    # Differences 1 and 3 points: mean 2, deviation sqrt(2); half an interval is 12.7062 with one degree of freedom.
    found = compare_sampling.summarize("p", rows(everything=[0.5, 0.6], default=[0.51, 0.63]))
    cells = ("p", 2, "55.00", "57.00", "+2.00 ± 1.41", "-10.71 to +14.71")
    assert found == dict(zip(compare_sampling.COLUMNS, cells, strict=True))


def test_some_rows_are_others_for_another_seed():
    pool = load_splits("digits", (("validation", 20),)).test
    first, again, other = (compare_sampling.shuffled(pool, 9, seed).columns["pixel_values"] for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other) and len(first) == 9
    assert compare_sampling.shuffled(pool, None, 1) is pool


def test_both_forms_are_trained_once(tmp_path, monkeypatch):
    protocol = replace(
        compare_sampling.PROTOCOLS["digits-65-tokens"],
        most=(32, 20),
        count=16,
        teacher={"name": "tiny", **VIT, "depth": 3},
        student={"name": "tiny", **VIT, "depth": 2},
        teacher_args=ARGS,
        args=ARGS,
    )
    monkeypatch.setattr(compare_sampling, "RESULTS", tmp_path / "rows")
    monkeypatch.setattr(compare_sampling, "PROTOCOLS", {"tiny": protocol})
    monkeypatch.setattr(compare_sampling, "OUTPUTS", tmp_path / "outputs")
    compare_sampling.run_protocol("tiny", [3])
    path = tmp_path / "rows" / "tiny.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["variant"], row["seed"]) for row in kept] == [("everything", 3), ("default", 3)]
    assert all(row["args"] == ARGS and 0 <= row["accuracy"] <= 1 and row["protocol"] == "tiny" for row in kept)
    monkeypatch.setattr(compare_sampling, "run", lambda *args: pytest.fail("it was run already"))
    compare_sampling.run_protocol("tiny", [3])
