"""scripts/accuracy/record.py: rows of another form are refused, and runs that are the same are not made again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from accuracy.protocol import Method, read_methods, read_protocols
from accuracy.record import Record, Run
from accuracy.rows import RESULTS, read_rows
from accuracy.rows import TEACHER as TEACHER_NAME
from accuracy.runs import Bench
from accuracy_cases import PROTOCOLS, STUDENT, TEACHER, TRAINING


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"name": "digits", "train": 60, "validation": 50, "test": 60}},
        {"student": {**STUDENT, "name": "another"}},
        {"teacher": {**TEACHER, "training": {**TRAINING, "num_train_epochs": 2}, "planted": {"layers": 3, "seed": 1}}},
        {"training": {**TRAINING, "learning_rate": 0.001}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_rows_of_another_form_of_the_protocol_are_refused(ran, tmp_path, changes):
    path = ran.copied(tmp_path)
    with pytest.raises(SystemExit, match=f"tiny.jsonl holds rows of another form .*{next(iter(changes))} differ"):
        ran.bench(tmp_path, **changes)
    assert path.read_text().splitlines() == ran.lines


def test_more_seeds_and_methods_are_no_other_form(ran, tmp_path, monkeypatch):
    path = ran.copied(tmp_path)
    monkeypatch.setattr(Bench, "train", lambda *args: 0.0)
    ran.bench(tmp_path, test_seeds=[0, 1, 2], methods=["student", "kd", "fitnet"], description="new").run()
    assert path.read_text().splitlines() == ran.lines


@pytest.mark.parametrize("value", [3.0, 3])
def test_a_run_that_was_made_under_another_name_is_not_made_again(ran, tmp_path, monkeypatch, value):
    path = ran.copied(tmp_path, lambda row: (row["method"], row["split"]) == ("semckd-tuned", "test"))
    monkeypatch.setattr(Bench, "_student", lambda *args: pytest.fail("it was run already"))
    made = ran.bench(tmp_path)
    (method,) = read_methods(["semckd-tuned"])
    found = made.train(Run(method, {"feature_weight": value}, 0, "test"))
    (row,) = [x for x in read_rows(path) if (x["method"], x["split"]) == ("semckd-tuned", "test")]
    (default,) = [x for x in ran.rows if x["method"] == "semckd"]
    assert row["extras"] == {**default["extras"], "same_run_as": "semckd"}
    assert found == row["value"] == default["value"] and row["seconds"] == default["seconds"]
    assert row["settings"]["tuned"] == {"feature_weight": 3.0}


def test_other_settings_are_no_twins(ran, tmp_path):
    ran.copied(tmp_path)
    record = ran.bench(tmp_path).record
    (method,) = read_methods(["semckd"])
    assert method == Method("semckd", "semckd")

    def twin(tuned: dict[str, Any] | None = None, seed: int = 0, split: str = "test", **changes: Any) -> Any:
        return record.twin(Run(replace(method, **changes), tuned or {}, seed, split))

    assert twin()["method"] in ("semckd", "semckd-tuned")
    assert twin({"feature_weight": 3}) is not None
    assert twin({"feature_weight": 2.5}) is None
    assert twin(association="cka") is None
    assert twin(options={"layers": 1}) is None
    assert twin(seed=1) is None
    assert twin(split="tuning") is None


@pytest.mark.parametrize("path", sorted(PROTOCOLS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_kept_rows_are_of_the_methods_as_they_are_today(path):
    """Settings change their names and defaults their values: a row of another form would have to be run again."""
    for protocol in [] if path.stem == "methods" else read_protocols(path):
        record = Record(protocol, RESULTS / f"{protocol.name}.jsonl")
        methods = {method.name: method for method in (Method(TEACHER_NAME), *protocol.methods)}
        for row in record.rows.values():
            run = Run(methods[row["method"]], row["settings"]["tuned"], row["seed"], row["split"])
            assert record.find(run) == row["value"]
            assert row["settings"]["arguments"] == run.recipe


@pytest.mark.parametrize(
    ("name", "recipe", "same", "other"),
    [
        ("resnet_fashion", {}, 100, 3),
        ("resnet_regnet_fashion", {}, 100, 3),
        ("resnet_fashion", {"projector": "shared"}, 3, 100),
        ("resnet_vit_fashion", {}, 3, 100),
        ("vit_resnet_fashion", {}, 3, 100),
    ],
)
def test_a_default_weight_is_that_of_the_models_and_projector(name, recipe, same, other, tmp_path):
    """Else the run of a weight that is the default of other models would be taken for that of the default."""
    (protocol,) = read_protocols(PROTOCOLS / f"{name}.yaml")
    record = Record(protocol, tmp_path / "rows.jsonl")
    recipe = {"loss": "semckd", "association": None, "options": {}, **recipe}
    assert record.digest(recipe) == record.digest({**recipe, "feature_weight": same})
    assert record.digest(recipe) != record.digest({**recipe, "feature_weight": other})
