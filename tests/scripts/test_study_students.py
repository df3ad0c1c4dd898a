"""scripts/study_students.py: a line of the table by hand, and a tiny protocol from start to rows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import study_students
from accuracy.data import load_splits

ARGS = {"max_steps": 2, "per_device_train_batch_size": 8}


def row(variant, seed, accuracy, kept=(0.5, 0.4, 0.6)):
    shared = {"split": "test", "parameters": {"teacher": 100, "student": 40}, "kept": list(kept)}
    return {"variant": variant, "seed": seed, "accuracy": accuracy, **shared} | {
        "p50": {"teacher": {"1": 9.0}, "student": {"1": 3.0}}
    }


def test_a_line_by_hand():
    # Differences 1 and 3 points: mean 2, deviation sqrt(2); half an interval is 12.7062 with one degree of freedom.
    rows = [row("new", 0, 0.5), row("new", 1, 0.6), row("even", 0, 0.51), row("even", 1, 0.63, (0.7, 0.6, 0.8))]
    rows += [{**row("even", 100, 0.9), "split": "tuning"}]
    new, even = study_students.summarize("p", rows)
    assert list(new.values()) == ["p", "new", 2, "40%", "55.00 ± 7.07", "", "", "40.0 - 60.0", "33%"]
    cells = ["p", "even", 2, "40%", "57.00 ± 8.49", "+2.00 ± 1.41", "-10.71 to +14.71", "50.0 - 70.0", "33%"]
    assert list(even.values()) == cells


@pytest.mark.parametrize("tune", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_start_is_trained_once(tune, tmp_path, monkeypatch):
    splits = load_splits("digits", (("validation", 20), ("test", 30)))
    protocol = replace(
        study_students.PROTOCOLS["images"],
        load=lambda: (splits.pool, splits.validation, splits.test),
        count=70,
        blocks=1,
        teacher={"name": "tiny", "family": "vit", "size": 8, "patch": 4, "width": 24, "depth": 2},
        teacher_args={**ARGS, "learning_rate": 1e-3},
        args=ARGS,
        rates=(1e-3, 1e-4),
    )
    monkeypatch.setattr(study_students, "RESULTS", tmp_path / "rows")
    monkeypatch.setattr(study_students, "PROTOCOLS", {"tiny": protocol})
    monkeypatch.setattr(study_students, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.setattr(study_students, "RATES", (1e-3,))
    study_students.run_protocol("tiny", [3], ["new", "even"], tune)
    kept = [json.loads(line) for line in (tmp_path / "rows" / "tiny.jsonl").read_text().splitlines()]
    expected = [("new", 100, 1e-3), ("even", 100, 1e-3)] if tune else [("new", 3, 1e-3), ("even", 3, 1e-4)]
    assert [(row["variant"], row["seed"], row["rate"]) for row in kept] == expected
    assert all(0 <= row["accuracy"] <= 1 for row in kept)
    if not tune:
        assert kept[0]["kept"][0] == pytest.approx(kept[0]["accuracy"] / kept[0]["teacher_accuracy"])
    monkeypatch.setattr(study_students, "train_student", lambda *args: pytest.fail("it was run already"))
    study_students.run_protocol("tiny", [3], ["new", "even"], tune)
