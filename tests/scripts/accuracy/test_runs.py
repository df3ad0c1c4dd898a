"""scripts/accuracy/runs.py: what is tuned, trained and tested, on scans of digits and tiny models."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from accuracy import models, runs
from accuracy.planted import PlantedTeacher
from accuracy.protocol import read_methods
from accuracy.record import Run
from accuracy.rows import KEYS, key_of, read_rows, validate_row
from accuracy.runs import Bench
from accuracy_cases import TEACHER, TRAINING

from hf_semckd.errors import ConfigurationError


def counted(patch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Write down which students are trained."""
    seen, original = [], Bench._student

    def student(self: Any, run: Any) -> Any:
        seen.append((run.method.name, run.seed))
        return original(self, run)

    patch.setattr(Bench, "_student", student)
    return seen


def test_a_run_leaves_a_row_for_everything(ran):
    tests = {(row["method"], row["seed"]) for row in ran.rows if row["split"] == "test"}
    assert tests == {("teacher", 0), ("student", 0), ("kd", 0), ("semckd", 0), ("semckd-tuned", 0)}
    tuning = [(row["method"], row["seed"]) for row in ran.rows if row["split"] == "tuning"]
    assert sorted(tuning) == [("kd", 100)] * 3 + [("semckd-tuned", 100)] * 3
    assert len(ran.lines) == len(ran.rows) == 11
    for row in ran.rows:
        validate_row(row)
        assert row.keys() == KEYS.keys()
        assert (row["protocol"], row["teacher"], row["student"]) == ("tiny", "vit-3x24", "vit-2x24")
        assert row["settings"]["data"]["train"] == 40 and row["settings"]["training"] == TRAINING
        assert 0 <= row["value"] * (50 if row["split"] == "tuning" else 60) <= 60


def test_rows_tell_what_was_run(ran):
    by_method = {row["method"]: row for row in ran.rows if row["split"] == "test"}
    association = np.asarray(by_method["semckd"]["extras"]["association"])
    assert association.shape == (2, 3)
    np.testing.assert_allclose(association.sum(1), 1, atol=1e-3)
    assert by_method["semckd"]["extras"]["loss_parameters"] > 0
    assert "association" not in by_method["kd"]["extras"] and "association" not in by_method["student"]["extras"]
    assert by_method["student"]["parameters"] == by_method["semckd"]["parameters"] < by_method["teacher"]["parameters"]
    assert by_method["student"]["settings"]["arguments"]["feature_weight"] == 0.0


def test_test_rows_carry_what_was_chosen(ran):
    for name in ("kd", "semckd-tuned"):
        own = [row for row in ran.rows if row["method"] == name]
        (test,) = [row for row in own if row["split"] == "test"]
        tuning = [row for row in own if row["split"] == "tuning"]
        # Of equals the first.
        best = max(tuning, key=lambda row: row["value"])
        assert test["settings"]["tuned"] == best["settings"]["tuned"]


def test_a_second_run_adds_nothing(ran, tmp_path, monkeypatch):
    path = ran.copied(tmp_path)
    monkeypatch.setattr(Bench, "_student", lambda *args: pytest.fail("it was run already"))
    ran.bench(tmp_path).run()
    assert path.read_text().splitlines() == ran.lines


@pytest.mark.parametrize(("method", "split"), [("semckd", "test"), ("kd", "test"), ("student", "test")])
def test_a_deleted_row_is_run_again_with_the_same_value(ran, tmp_path, monkeypatch, method, split):
    path = ran.copied(tmp_path, lambda row: (row["method"], row["split"]) == (method, split))
    seen = counted(monkeypatch)
    again = ran.bench(tmp_path)
    # The twin of a row that is gone is there still: it is not what is looked at here.
    monkeypatch.setattr(again.record, "twin", lambda *args: None)
    again.run()
    assert seen == [(method, 0)]
    rows = read_rows(path)
    before = {key_of(row): row for row in ran.rows}
    assert {key_of(row) for row in rows} == before.keys()
    (new,) = [row for row in rows if (row["method"], row["split"]) == (method, split)]
    old = before[key_of(new)]
    assert new["value"] == old["value"] and new["extras"].get("terms") == old["extras"].get("terms")
    assert new["settings"] == old["settings"]


def test_only_named_methods_are_run(ran, tmp_path, monkeypatch):
    seen = counted(monkeypatch)
    ran.bench(tmp_path).run(["student"])
    assert seen == [("student", 0)]
    rows = read_rows(tmp_path / "tiny.jsonl")
    assert [row["method"] for row in rows] == ["teacher", "student"]


def test_other_seeds_may_be_asked_for(ran, tmp_path, monkeypatch):
    seen = counted(monkeypatch)
    ran.bench(tmp_path).run(["student"], [7, 8])
    assert seen == [("student", 7), ("student", 8)]


def test_a_seed_that_tuned_is_no_test_seed(ran, tmp_path, monkeypatch):
    seen = counted(monkeypatch)
    with pytest.raises(ConfigurationError, match=r"(?s)seeds \[100\], which tune.*leave them out"):
        ran.bench(tmp_path).run(["student"], [99, 100])
    assert not seen


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ({3.0: (0.1, 0.2), 1.0: (0.5, 0.0), 10.0: (0.2, 0.2)}, 1.0),
        ({3.0: (0.1, 0.2), 1.0: (0.5, 0.0), 10.0: (0.2, 0.4)}, 10.0),
        ({3.0: (0.3, 0.2), 1.0: (0.5, 0.0), 10.0: (0.2, 0.3)}, 3.0),
    ],
)
def test_the_best_on_validation_is_tested(ran, tmp_path, monkeypatch, scores, chosen):
    calls = []

    def train(self: Any, run: Any) -> float:
        calls.append((run.method.name, dict(run.tuned), run.seed, run.split))
        # On test it would be the other way round.
        return scores[run.tuned["feature_weight"]][run.seed - 100] if run.split == "tuning" else 0.0

    monkeypatch.setattr(Bench, "train", train)
    made = ran.bench(tmp_path, methods=["fitnet", "semckd-tuned"], tuning_seeds=[100, 101], test_seeds=[0, 1])
    (method,) = [entry for entry in made.protocol.methods if entry.name == "semckd-tuned"]
    made.run(["semckd-tuned"])
    tuning = [("semckd-tuned", {"feature_weight": w}, s, "tuning") for w in (3.0, 1.0, 10.0) for s in (100, 101)]
    assert calls == tuning + [("semckd-tuned", {"feature_weight": chosen}, seed, "test") for seed in (0, 1)]
    assert made.tune(method) == {"feature_weight": chosen}


def test_a_protocol_without_tuning_takes_the_defaults(ran, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(Bench, "train", lambda self, run: calls.append((run.tuned, run.seed, run.split)) or 0.0)
    ran.bench(tmp_path, tune=False).run(["semckd-tuned", "kd"])
    assert calls == [({}, 0, "test")] * 2


def test_a_method_without_a_grid_is_not_tuned(ran, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(Bench, "train", lambda self, run: calls.append((run.tuned, run.seed, run.split)) or 0.0)
    ran.bench(tmp_path).run(["semckd"])
    assert calls == [({}, 0, "test")]


def test_tuning_looks_at_the_validation_split_alone(ran, tmp_path, monkeypatch):
    made, looked = ran.bench(tmp_path), []
    monkeypatch.setattr(runs, "accuracy", lambda model, rows: looked.append(rows) or 0.5)
    (method,) = read_methods(["semckd"])
    made.train(Run(method, {}, 100, "tuning"))
    made.train(Run(method, {}, 0, "test"))
    assert looked[0] is made.splits.validation and looked[1] is made.splits.test


def test_a_teacher_is_trained_once(ran, tmp_path, monkeypatch):
    kept = sorted(path.name for path in (ran.outputs / "teachers").iterdir())
    assert len(kept) == 1 and kept[0].startswith("vit-3x24-")
    monkeypatch.setattr(models, "Trainer", lambda *args, **options: pytest.fail("it was trained already"))
    made = ran.bench(tmp_path)
    assert not made.teacher.training and made.teacher is made.plain_teacher
    described = json.loads((ran.outputs / "teachers" / kept[0] / "described.json").read_text())
    assert (
        described["model"] == TEACHER
        and "test" not in described["data"]
        and described["rows"] == len(made.splits.pool)
    )


def test_a_planted_teacher_keeps_its_accuracy(ran, tmp_path):
    planted = {"layers": 3, "seed": 1, "useless": 1}
    teacher = {**TEACHER, "training": {**TRAINING, "num_train_epochs": 2}, "planted": planted}
    made = ran.bench(tmp_path, teacher=teacher)
    assert isinstance(made.teacher, PlantedTeacher)
    made.run(["semckd"])
    (own,) = [row for row in read_rows(made.path) if row["method"] == "teacher"]
    (before,) = [row for row in ran.rows if row["method"] == "teacher"]
    assert own["value"] == before["value"]
    (row,) = [row for row in read_rows(made.path) if row["method"] == "semckd"]
    assert np.asarray(row["extras"]["association"]).shape == (2, 4)
