"""The paper's studies in scripts/accuracy: maps, curves and mismatch by hand, their pictures, and their protocols."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from makers import distiller, images

from hf_semckd.errors import ConfigurationError, InputError

ROOT = Path(__file__).resolve().parents[2]
PROTOCOLS = ROOT / "scripts" / "protocols"


@pytest.fixture(scope="module")
def parts() -> Any:
    """The command and the modules of scripts/accuracy that it uses."""
    folders = [str(ROOT / "scripts"), str(ROOT / "examples")]
    sys.path[:0] = folders
    try:
        import study_accuracy
        from accuracy import mismatch, protocol, rows, runs, studies, study_pictures
    finally:
        sys.path[:] = [entry for entry in sys.path if entry not in folders]
    found = ModuleType("parts")
    for module in (study_accuracy, mismatch, protocol, rows, runs, studies, study_pictures):
        setattr(found, module.__name__.rpartition(".")[2], module)
    return found


def row(protocol: str, method: str, seed: int, value: float, **changes: Any) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "teacher": "ViT-6",
        "student": "ViT-3",
        "method": method,
        "seed": seed,
        "split": "test",
        "metric": "accuracy",
        "value": value,
        "settings": {"tuned": {}},
        "commit": None,
        "versions": {},
        "machine": "a processor",
        "seconds": 1.0,
        "parameters": 10,
        "extras": {},
        **changes,
    }


def map_rows() -> list[dict[str, Any]]:
    return [
        row("m", "kd", 0, 0.50),
        row("m", "kd", 1, 0.60),
        row("m", "kd", 2, 0.10),
        row("m", "pair-1-1", 0, 0.51),
        row("m", "pair-1-1", 1, 0.63),
        row("m", "pair-2-3", 1, 0.55),
        row("m", "pair-2-3", 7, 0.99),  # the baseline has no such seed
        row("m", "pair-2-1", 0, 0.99, split="tuning"),
        row("m", "semckd", 0, 0.7),
        row("other", "pair-3-3", 0, 0.9),
    ]


def curve_rows() -> list[dict[str, Any]]:
    values = {("c@30", "kd"): [0.5, 0.6, 0.7], ("c@0.3", "kd"): [0.2], ("c@3", "semckd"): [0.4, 0.6]}
    found = [row(p, method, seed, value) for (p, method), v in values.items() for seed, value in enumerate(v)]
    return [*found, row("c@30", "teacher", 0, 0.9), row("c", "kd", 0, 0.1), row("cc@5", "kd", 0, 0.1)]


# ---- The map -----------------------------------------------------------------------------------------------------


def test_a_map_is_paired_by_seed(parts):
    found = parts.studies.negative_map(map_rows(), "m")
    assert found.n.tolist() == [[2, 0, 0], [0, 0, 1]]
    assert found.mean[0, 0] == pytest.approx(0.02) and found.mean[1, 2] == pytest.approx(-0.05)
    assert found.std[0, 0] == pytest.approx(0.02 / math.sqrt(2))
    assert math.isnan(found.std[1, 2])
    assert np.isnan(found.mean).sum() == 4


def test_another_baseline(parts):
    found = parts.studies.negative_map(map_rows(), "m", "semckd")
    assert found.mean[0, 0] == pytest.approx(-0.19) and found.n[0, 0] == 1


def test_the_table_of_a_map_is_in_points(parts):
    found = parts.studies.negative_map(map_rows(), "m")
    lines = parts.studies.negative_table(found).splitlines()
    assert lines[0] == "| layer | teacher 1 | teacher 2 | teacher 3 |"
    assert lines[2] == "| student 1 | +2.00 ± 1.41 (n = 2) | - | - |"
    assert lines[3] == "| student 2 | - | - | -5.00 (n = 1) |"
    assert parts.studies.negative_sentence(found).startswith("1 of 2 pairs of layers give a lower")


@pytest.mark.parametrize("missing", ["kd", "pair-"])
def test_a_map_needs_the_baseline_and_pairs(parts, missing):
    rows = [entry for entry in map_rows() if not entry["method"].startswith(missing)]
    with pytest.raises(InputError, match="no map of m yet"):
        parts.studies.negative_map(rows, "m")


# ---- Curves ------------------------------------------------------------------------------------------------------


def test_curves_are_means_over_seeds_by_ascending_value(parts):
    kd, semckd = parts.studies.curves(curve_rows(), "c")
    assert (kd.method, semckd.method) == ("kd", "semckd")
    assert kd.values.tolist() == semckd.values.tolist() == [0.3, 3.0, 30.0]
    np.testing.assert_allclose(kd.mean, [0.2, math.nan, 0.6])
    np.testing.assert_allclose(kd.error, [math.nan, math.nan, 0.1 / math.sqrt(3)])
    assert kd.n.tolist() == [1, 0, 3]
    assert semckd.error[1] == pytest.approx(0.1)


def test_curves_of_chosen_methods_in_their_order(parts):
    found = parts.studies.curves(curve_rows(), "c", ["teacher", "kd", "rkd"])
    assert [curve.method for curve in found] == ["teacher", "kd", "rkd"]
    assert found[2].n.sum() == 0


def test_the_table_of_curves_is_in_percent(parts):
    lines = parts.studies.curve_table(parts.studies.curves(curve_rows(), "c")).splitlines()
    assert lines[0] == "| method | 0.3 | 3 | 30 |"
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["kd", "20.00", "-", "60.00 ± 5.77"]


def test_curves_need_rows_of_numbers(parts):
    with pytest.raises(InputError, match="no curve of d yet"):
        parts.studies.curves(curve_rows(), "d")
    with pytest.raises(InputError, match="no point of a curve"):
        parts.studies.curves([row("c@wide", "kd", 0, 0.5)], "c")


# ---- Mismatch ----------------------------------------------------------------------------------------------------


def naive_score(students: Any, teachers: Any, association: Any) -> float:
    """The definition, number by number."""

    def similarity(rows: Any) -> list[list[float]]:
        def norm(r: Any) -> float:
            return math.sqrt(sum(x * x for x in r))

        return [[sum(x * y for x, y in zip(a, b, strict=True)) / (norm(a) * norm(b)) for b in rows] for a in rows]

    total = 0.0
    for s, student in enumerate(students):
        for t, teacher in enumerate(teachers):
            own, theirs = similarity(student.tolist()), similarity(teacher.tolist())
            squares = sum((own[i][j] - theirs[i][j]) ** 2 for i in range(len(own)) for j in range(len(own)))
            total += association[s][t] * math.sqrt(squares)
    return math.log(total / len(students))


def test_the_score_is_its_definition(parts):
    generator = torch.Generator().manual_seed(0)
    students = [torch.randn(5, width, generator=generator) for width in (3, 4)]
    teachers = [torch.randn(5, width, generator=generator) for width in (6, 2, 7)]
    association = torch.rand(2, 3, generator=generator).softmax(-1).numpy()
    score = parts.mismatch.mismatch_score
    assert score(students, teachers, association) == pytest.approx(naive_score(students, teachers, association))
    scaled = [7 * rows for rows in teachers]
    assert score(students, scaled, association) == pytest.approx(score(students, teachers, association))


def test_layers_that_see_alike_do_not_differ(parts):
    rows = torch.eye(3)
    assert parts.mismatch.mismatch_score([rows], [2 * rows, torch.ones(3, 2)], np.array([[1.0, 0.0]])) == -math.inf


@pytest.mark.parametrize(("shape", "samples"), [((2, 1), 4), ((1, 2), 4), ((1, 1), 3)])
def test_a_score_of_what_does_not_belong_together_is_refused(parts, shape, samples):
    with pytest.raises(InputError, match="do not belong together"):
        parts.mismatch.mismatch_score([torch.ones(4, 2)], [torch.ones(samples, 2)], np.ones(shape))


def test_the_score_of_a_run_leaves_it_as_it_is(parts, tmp_path):
    trainer = distiller(tmp_path)
    pixels = torch.stack([images()[index]["pixel_values"] for index in range(6)])
    rows = parts.mismatch.Rows({"pixel_values": pixels, "labels": torch.zeros(6, dtype=torch.long)}, 3)
    known: dict[Any, Any] = {}
    assert parts.mismatch.measured_mismatch(trainer, rows, known) is None
    trainer.train()
    before, state = trainer.student.state_dict(), torch.get_rng_state()
    before = {name: value.clone() for name, value in before.items()}
    found = parts.mismatch.measured_mismatch(trainer, rows, known)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in trainer.student.state_dict().items())
    with torch.no_grad():
        student, teacher = (
            [entry.mean(1) for entry in model(pixel_values=pixels, output_hidden_states=True).hidden_states[1:]]
            for model in (trainer.student.eval(), trainer.teacher)
        )
    assert found == pytest.approx(parts.mismatch.mismatch_score(student, teacher, trainer.association()), rel=1e-5)
    (kept,) = known.values()
    assert [tuple(entry.shape) for entry in kept] == [tuple(entry.shape) for entry in teacher]


def test_the_table_of_scores(parts):
    rows = [
        row("a", "semckd", 0, 0.5, extras={"mismatch": 1.0}),
        row("a", "semckd", 1, 0.5, extras={"mismatch": 2.0}),
        row("a", "semckd", 2, 0.5, split="tuning", extras={"mismatch": 9.0}),
        row("a", "kd", 0, 0.5),
        row("b", "semckd-uniform", 0, 0.5, extras={"mismatch": 0.0}),
        row("c", "kd", 0, 0.5),
    ]
    assert parts.studies.mismatches(rows, ["a", "c"]) == {"a": {"semckd": [1.0, 2.0]}, "c": {}}
    lines = parts.studies.mismatch_table(rows, ["a", "b", "c"]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["method", "a", "b"]
    assert cells[2:] == [["semckd", "1.500 ± 0.707", "-"], ["semckd-uniform", "-", "0.000"]]
    with pytest.raises(InputError, match="no semantic mismatch scores yet"):
        parts.studies.mismatch_table(rows, ["c"])


# ---- Pictures ----------------------------------------------------------------------------------------------------


def test_the_picture_of_a_map(parts, tmp_path):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    found = parts.studies.negative_map(map_rows(), "m")
    figure, axes = parts.study_pictures.plot_negative_map(found, title="a $ and a $")
    assert isinstance(figure, Figure) and isinstance(axes, Axes)
    assert sorted(text.get_text() for text in axes.texts) == sorted(["+2.00", "-5.00", "–", "–", "–", "–"])
    low, high = axes.collections[0].get_clim()
    assert low == -high == pytest.approx(-5.0)
    path = parts.study_pictures.save_picture(figure, tmp_path / "new" / "map.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_map_of_nothing_can_be_drawn(parts):
    empty = parts.studies.NegativeMap(np.full((1, 1), math.nan), np.full((1, 1), math.nan), np.zeros((1, 1), int))
    parts.study_pictures.plot_negative_map(empty)[0].canvas.draw()


def test_the_picture_of_curves(parts, tmp_path):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    found = parts.studies.curves(curve_rows(), "c")
    figure, axes = parts.study_pictures.plot_curves(found, label="weight")
    assert isinstance(figure, Figure) and isinstance(axes, Axes)
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "weight"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["kd", "semckd"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.3", "3", "30"]
    parts.study_pictures.save_picture(figure, tmp_path / "curves.png")
    with pytest.raises(InputError, match="nothing to draw"):
        parts.study_pictures.plot_curves([])


@pytest.mark.parametrize(
    ("values", "wide"), [([0.3, 30], True), ([200, 2000], False), ([0.0, 0.6], False), ([1, 10.1], True)]
)
def test_the_axis_is_logarithmic_beyond_a_factor_of_ten(parts, values, wide):
    assert parts.study_pictures.is_wide(np.array(values)) is wide


# ---- Protocols ---------------------------------------------------------------------------------------------------


def written(folder: Path, **changes: Any) -> Path:
    content = {"data": {"name": "digits"}, "teacher": {}, "student": {}, "training": {}, "methods": ["kd"], **changes}
    path = folder / "p.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_pair_of_layers_is_a_method(parts, tmp_path):
    (protocol,) = parts.protocol.read_protocols(written(tmp_path, methods=["kd", "pair-2-15"]))
    pair = protocol.methods[1]
    assert (pair.name, pair.loss, pair.association) == ("pair-2-15", "semckd", None)
    assert pair.arguments == {"association": "uniform", "student_layers": [2], "teacher_layers": [15]}
    assert pair.candidates() == [{}]


@pytest.mark.parametrize("name", ["pair-0-1", "pair-1-0", "pair-1", "pair-1-2-3", "pair-a-b"])
def test_what_is_no_pair_is_refused(parts, tmp_path, name):
    with pytest.raises(ConfigurationError, match=r"pair-<s>-<t>"):
        parts.protocol.read_protocols(written(tmp_path, methods=[name]))


def test_a_protocol_tunes_unless_it_says_otherwise(parts, tmp_path):
    assert parts.protocol.read_protocols(written(tmp_path))[0].tune is True
    assert parts.protocol.read_protocols(written(tmp_path, tune=False))[0].tune is False
    with pytest.raises(ConfigurationError, match="tune: true or tune: false"):
        parts.protocol.read_protocols(written(tmp_path, tune="no"))


def test_without_tuning_nothing_of_the_grid_is_taken(parts, tmp_path):
    (protocol,) = parts.protocol.read_protocols(written(tmp_path, tune=False, methods=["kd", "fitnet"]))
    bench = parts.runs.Bench.__new__(parts.runs.Bench)
    bench.protocol = protocol
    assert [bench.tune(method) for method in protocol.methods] == [{}, {}]


@pytest.mark.parametrize(
    ("name", "section", "key", "methods"),
    [
        ("few_labels", "data", "train", {"student", "kd", "semckd", "rkd"}),
        ("noisy_labels", "data", "noise", {"student", "kd", "semckd", "rkd"}),
        ("batch_size", "training", "per_device_train_batch_size", {"kd", "semckd"}),
        ("feature_weight", "training", "feature_weight", {"semckd", "semckd-uniform"}),
    ],
)
def test_the_protocols_of_the_curves(parts, name, section, key, methods):
    protocols = parts.protocol.read_protocols(PROTOCOLS / f"{name}.yaml")
    values = [getattr(entry, section)[key] for entry in protocols]
    assert [entry.name for entry in protocols] == [f"{name}@{value}" for value in values]
    assert len(values) > 3 and values == sorted(set(values))
    for entry in protocols:
        assert not entry.tune and len(entry.test_seeds) == 5
        assert methods <= {method.name for method in entry.methods}


def test_the_map_has_every_pair_once(parts):
    (protocol,) = parts.protocol.read_protocols(PROTOCOLS / "negative_map.yaml")
    expected = [f"pair-{s}-{t}" for s in range(1, 4) for t in range(1, 7)]
    assert [method.name for method in protocol.methods] == ["kd", *expected]
    # With a tuned baseline, a pair would differ from it in more than the pair.
    assert not protocol.tune


def test_a_swept_feature_weight_is_not_overridden(parts):
    for protocol in parts.protocol.read_protocols(PROTOCOLS / "feature_weight.yaml"):
        assert all("feature_weight" not in method.arguments for method in protocol.methods)


# ---- The command -------------------------------------------------------------------------------------------------


def call(parts: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, *words: Any) -> None:
    places = ["--results", str(folder), "--pictures", str(folder / "pictures")]
    monkeypatch.setattr(sys, "argv", ["study_accuracy.py", *map(str, words), *places])
    parts.study_accuracy.main()


def store(folder: Path, rows: list[dict[str, Any]]) -> None:
    for entry in rows:
        with open(folder / f"{entry['protocol']}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def test_the_command_shows_a_map_of_kept_rows(parts, monkeypatch, tmp_path, capsys):
    pairs = [row("negative_map", "pair-3-6", 0, 0.4, extras={"mismatch": 1.25})]
    store(tmp_path, [row("negative_map", "kd", 0, 0.5), *pairs])
    path = PROTOCOLS / "negative_map.yaml"
    call(parts, monkeypatch, tmp_path, "negative-map", path, "--table-only")
    assert "-10.00 (n = 1)" in capsys.readouterr().out
    assert (tmp_path / "pictures" / "negative_map.png").is_file()
    call(parts, monkeypatch, tmp_path, "mismatch", path, PROTOCOLS / "methods.yaml", "--table-only")
    assert "| pair-3-6 |" in capsys.readouterr().out


def test_the_command_shows_curves_of_kept_rows(parts, monkeypatch, tmp_path, capsys):
    path = PROTOCOLS / "few_labels.yaml"
    store(tmp_path, [row(entry.name, "kd", 0, 0.5) for entry in parts.protocol.read_protocols(path)])
    call(parts, monkeypatch, tmp_path, "curve", path, "--table-only")
    assert "labeled training samples" in capsys.readouterr().out
    assert (tmp_path / "pictures" / "few_labels.png").is_file()


def test_the_command_shows_the_association_of_kept_rows(parts, monkeypatch, tmp_path, capsys):
    kept = [[[0.9, 0.1], [0.3, 0.7]], [[0.7, 0.3], [0.1, 0.9]]]
    rows = [row("vit_fashion", "semckd", seed, 0.5, extras={"association": kept[seed]}) for seed in (0, 1)]
    others = [
        row("vit_fashion", "semckd", 100, 0.5, split="tuning", extras={"association": [[0, 1], [0, 1]]}),
        row("vit_fashion", "semckd-uniform", 0, 0.5, extras={"association": [[0, 1], [0, 1]]}),
        row("vit_fashion", "semckd", 2, 0.5),
    ]
    store(tmp_path, [*rows, *others])
    call(parts, monkeypatch, tmp_path, "association", PROTOCOLS / "vit_fashion.yaml", "--table-only")
    out = capsys.readouterr().out
    assert (
        "vit_fashion, mean of 2 seeds" in out and "| student 1 | 80 | 20 |" in out and "| student 2 | 20 | 80 |" in out
    )
    assert (tmp_path / "pictures" / "association_vit_fashion.png").is_file()
    with pytest.raises(SystemExit, match="no association of deep_vit_fashion yet"):
        call(parts, monkeypatch, tmp_path, "association", PROTOCOLS / "deep_vit_fashion.yaml", "--table-only")


def test_the_command_says_what_is_missing(parts, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="no map of negative_map yet"):
        call(parts, monkeypatch, tmp_path, "negative-map", PROTOCOLS / "negative_map.yaml", "--table-only")
    with pytest.raises(SystemExit):
        call(parts, monkeypatch, tmp_path, "curve", PROTOCOLS / "vit_fashion.yaml", "--table-only")


def test_the_command_runs_only_what_a_study_needs(parts, monkeypatch, tmp_path):
    path, runs = PROTOCOLS / "few_labels.yaml", []
    monkeypatch.setattr(
        parts.study_accuracy, "run_protocol", lambda path, name, methods, results: runs.append((name, methods))
    )
    with pytest.raises(SystemExit):
        call(parts, monkeypatch, tmp_path, "mismatch", path)
    assert runs == [(entry.name, ["semckd"]) for entry in parts.protocol.read_protocols(path)]
