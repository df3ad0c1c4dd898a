"""scripts/benchmark_step.py: a quick run of the whole, and what the command says."""

from __future__ import annotations

import json
import sys

import benchmark_step
import pytest
from step_cases import record
from step_cost.variants import NAMES


def call(*arguments: str) -> None:
    """Run the command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmark_step.py", *arguments])
        benchmark_step.main()


@pytest.mark.slow
def test_a_quick_run_measures_every_variant(tmp_path, capsys):
    path = tmp_path / "quick.json"
    call("--quick", "--pairs", "bert-6x384", "resnet32x4-8x4", "--output", str(path))
    out = capsys.readouterr().out
    stored = json.loads(path.read_text())
    assert list(stored["pairs"]) == ["bert-6x384 (tiny)", "resnet32x4-8x4 (tiny)"]
    for pair in stored["pairs"].values():
        assert tuple(pair["seconds"]) == NAMES
        for times in (*pair["seconds"].values(), *pair["parts"].values()):
            assert len(times) == 2 and min(times) > 0
        assert pair["ratios"].keys() == {"ce / kd", "semckd / kd", "published / kd", "cached / kd", "cached / ce"}
        assert pair["skipped"] == {}
        # The cache was warm, and nothing but the cache spares the teacher.
        assert pair["teacher_runs_per_step"] == {"ce": 0, "kd": 1, "semckd": 1, "published": 1, "cached": 0}
        said = ("torch", "transformers", "hf_semckd", "machine", "cores_usable", "date")
        assert all(pair["conditions"][name] for name in said)
        assert pair["conditions"]["torch_threads"] == 1
    first, second = (pair["memory"] for pair in stored["pairs"].values())
    assert all(first[name]["peak_bytes"] >= first[name]["bytes_before_steps"] > 0 for name in ("kd", "semckd"))
    assert all("skipped" in second[name] for name in NAMES)

    assert "| bert-6x384 (tiny) |" in out and "| teacher forward |" in out
    call("--table", str(path))
    assert capsys.readouterr().out == out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_growth_joins_the_file_and_leaves_the_pairs(tmp_path, capsys):
    path = tmp_path / "step.json"
    path.write_text(json.dumps({"pairs": {"bert-6x384": record()}}))
    call("--quick", "--growth", "--output", str(path))
    stored = json.loads(path.read_text())
    assert stored["pairs"] == {"bert-6x384": record()}
    assert list(stored["growth"]) == ["default (tiny)", "published (tiny)"]
    for form in stored["growth"].values():
        assert list(form["axes"]) == ["student_layers", "teacher_layers", "batch", "length", "width"]
        assert all(min(times) > 0 for axis in form["axes"].values() for times in axis["seconds"])
    printed = capsys.readouterr().out
    assert "| form | student layers | teacher layers | batch | length | width |" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--pairs", "bert-5"), "bert-6x384"),
        (("--variants", "fast"), "semckd"),
        (("--rounds", "0"), "not at least 1"),
        (("--table", "missing.json"), "there is no file missing.json"),
    ],
)
def test_a_wrong_argument_is_named(arguments, words, capsys):
    with pytest.raises(SystemExit):
        call(*arguments)
    assert words in capsys.readouterr().err
