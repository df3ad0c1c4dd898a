"""scripts/benchmark_step.py: its arithmetic by hand, its step against Trainer.train, and a quick run of the whole."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "benchmark_step.py"
VARIANTS = ("ce", "kd", "semckd", "published", "cached")


@pytest.fixture(scope="module")
def parts() -> Any:
    """The script and the modules of scripts/step_cost, which it finds beside itself."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import benchmark_step
        from step_cost import growth, measure, memory, pairs, picture, rounds, summary, variants
    finally:
        sys.path.remove(str(SCRIPT.parent))
    found = ModuleType("parts")
    for module in (benchmark_step, growth, measure, memory, pairs, picture, rounds, summary, variants):
        setattr(found, module.__name__.rpartition(".")[2], module)
    return found


def record(**changes: Any) -> dict[str, Any]:
    """A stored pair whose ratios are easily seen: 1.04 and 1.10, of 3 rounds."""
    return {
        "pair": "bert-6x384",
        "family": "bert",
        "seconds": {
            "ce": [0.4, 0.5, 0.8],
            "kd": [1.0, 1.0, 2.0],
            "semckd": [1.03, 1.04, 2.2],
            "published": [3.0, 5.0, 8.0],
            "cached": [0.44, 0.6, 0.84],
        },
        "memory": {
            "kd": {"peak_bytes": 1000},
            "semckd": {"peak_bytes": 1060},
            "published": {"skipped": "it is too large"},
        },
        "parameters": {"semckd": {"student": 1000, "feature_loss": 125}},
        "skipped": {},
        "shares_of_kd": {"teacher forward": 0.5},
        **changes,
    }


def call(parts: Any, *arguments: str) -> None:
    """Run the command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        parts.benchmark_step.main()


# ---- Arithmetic ----------------------------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_round_and_not_between_medians(parts):
    # By round 1.5, 1, 2: median 1.5, quartiles 1.25 and 1.75. The ratio of the medians would be 1.
    ratio = parts.summary.paired_ratio([3.0, 3.0, 8.0], [2.0, 3.0, 4.0])
    assert ratio == {"median": 1.5, "low": 1.25, "high": 1.75}


def test_one_round_has_no_spread(parts):
    assert parts.summary.paired_ratio([3.0], [2.0]) == {"median": 1.5, "low": 1.5, "high": 1.5}


def test_rounds_that_do_not_match_are_refused(parts):
    with pytest.raises(ValueError):
        parts.summary.paired_ratio([1.0, 2.0], [1.0])


def test_targets_say_what_was_reached(parts):
    found = parts.summary.targets_of(record())
    assert found["SemCKD / KD"] == {"value": 1.04, "target": 1.05, "reached": True}
    assert found["cached / CE"]["value"] == pytest.approx(1.1)
    assert found["cached / CE"]["reached"]
    assert found["peak memory / KD"] == {"value": 1.06, "target": 1.05, "reached": False}
    assert found["projections / student"] == {"value": 0.125, "target": 0.2, "reached": True}


@pytest.mark.parametrize(("family", "reached"), [("bert", False), ("vit", False), ("resnet", True)])
def test_convolutional_pairs_have_a_target_of_their_own(parts, family, reached):
    seconds = {"kd": [1.0], "semckd": [1.06]}
    assert parts.summary.targets_of(record(family=family, seconds=seconds))["SemCKD / KD"]["reached"] is reached


def test_what_was_not_measured_has_no_target(parts):
    found = parts.summary.targets_of(record(seconds={"ce": [1.0]}, memory={}, parameters={}))
    assert found == {}


def test_the_table_of_a_stored_file(parts):
    lines = parts.summary.table({"pairs": {"bert-6x384": record()}}).splitlines()
    assert (
        lines[0]
        == "| pair | "
        + " | ".join(
            (
                "CE step, ms",
                "SemCKD / KD",
                "published / KD",
                "cached / CE",
                "peak memory / KD",
                "projections / student",
            )
        )
        + " |"
    )
    assert lines[2] == (
        "| bert-6x384 | 500.0 | 1.040 [1.035, 1.070] (≤ 1.05 reached) | 4.000 [3.500, 4.500] "
        "| 1.100 [1.075, 1.150] (≤ 1.15 reached) | 1.060 (≤ 1.05 missed) | 12.5 % (≤ 20 % reached) |"
    )


def test_the_table_says_what_was_left_out_and_why(parts):
    seconds = {"kd": [1.0], "semckd": [1.0]}
    skipped = {"ce": "not asked for", "cached": "not asked for", "published": "it needs 9 GB"}
    text = parts.summary.table({"pairs": {"p": record(seconds=seconds, skipped=skipped)}})
    assert "- p: not timed: ce, cached (not asked for)" in text
    assert "- p: not timed: published (it needs 9 GB)" in text
    assert "- p: peak memory not measured: published (it is too large)" in text


def test_the_table_says_when_others_used_the_processor(parts):
    conditions = {"device": "cpu", "torch_threads": 1}
    stored = {"pairs": {"p": record(conditions=conditions, processor_share=0.7)}}
    assert "- p: measured on a busy machine: the process had a processor for 70 % of the time" in parts.summary.table(
        stored
    )
    stored["pairs"]["p"]["processor_share"] = 0.99
    assert "busy" not in parts.summary.table(stored)


def test_the_parts_of_several_pairs_stand_side_by_side(parts):
    stored = {"pairs": {"a": record(), "b": record(shares_of_kd={"logits term": 0.25}), "c": record(shares_of_kd={})}}
    lines = parts.summary.parts_table(stored).splitlines()
    assert lines[0] == "| part | a | b |"
    assert lines[2:] == ["| teacher forward | 0.500 | - |", "| logits term | - | 0.250 |"]
    assert parts.summary.parts_table({"pairs": {}}) == ""


def test_the_slope_of_a_power_is_its_exponent(parts):
    sizes = [2, 4, 8]
    assert parts.growth.slope(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    # By hand: log2 of the sizes 1, 2, 3 and of the times 0, 0, 3; (-1 * -1 + 0 + 1 * 2) / 2.
    assert parts.growth.slope(sizes, [1.0, 1.0, 8.0]) == pytest.approx(1.5)
    assert parts.growth.slope([1, math.e], [2.0, 2.0]) == pytest.approx(0.0)


def test_the_growth_table_has_a_line_for_each_form(parts):
    axes = {"batch": {"exponent": 0.987}, "student_layers": {"exponent": 1.5}}
    assert parts.growth.growth_rows({"default": {"axes": axes}}) == [
        {"form": "default", "batch": "0.99", "student layers": "1.50"}
    ]


# ---- Real objects --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "student", "layers", "teacher", "blocks"),
    [
        ("bert-6x384", 384, 6, 768, 12),
        ("bert-4x312", 312, 4, 768, 12),
        ("vit-12x192", 192, 12, 768, 12),
        ("resnet34-18", 512, 8, 512, 16),
        ("resnet32x4-8x4", 256, 3, 256, 15),
    ],
)
def test_the_full_pairs_are_the_models_that_their_names_say(parts, name, student, layers, teacher, blocks):
    pair = parts.pairs.find_pair(name)
    with torch.device("meta"):
        models = [pair.make_student(), pair.make_teacher()]
    found = []
    for model in models:
        config = model.config
        resnet = pair.family == "resnet"
        width = config.hidden_sizes[-1] if resnet else config.hidden_size
        found += [width, sum(config.depths) if resnet else config.num_hidden_layers]
    assert found == [student, layers, teacher, blocks]


def test_small_images_keep_their_resolution_until_the_second_stage(parts):
    pair = parts.pairs.find_pair("resnet32x4-8x4")
    states = pair.make_student().eval()(torch.zeros(1, 3, 32, 32), output_hidden_states=True).hidden_states
    assert [tuple(state.shape[1:]) for state in states] == [(32, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8)]


class Gradients(TrainerCallback):
    """Keeps the gradients that `train()` is about to apply."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.kept = {name: entry.grad.clone() for name, entry in model.named_parameters() if entry.grad is not None}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_measured_step_has_the_gradients_of_train(parts, name, tmp_path):
    """No dropout in a ResNet: the same batch and weights must give the same gradients."""
    pair = parts.pairs.find_pair("resnet34-18", tiny=True)
    student, batch = pair.make_student(), pair.make_batches(1)[0]

    trainer = parts.variants.make_trainer(name, pair, student, pair.make_teacher(), "cpu", tmp_path / "train")
    trainer.args.max_steps, trainer.args.max_grad_norm = 1, 0.0
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(
        trainer.train_dataset, batch_size=pair.batch_size, collate_fn=trainer.data_collator
    )
    callback = Gradients()
    trainer.add_callback(callback)
    trainer.train()

    variant = parts.variants.make_variant(name, pair, student, pair.make_teacher(), "cpu", tmp_path / "step")
    variant.compute_gradients(batch)
    measured = {key: entry.grad for key, entry in variant.model.named_parameters() if entry.grad is not None}
    variant.close()
    assert measured.keys() == callback.kept.keys()
    for key, gradient in measured.items():
        torch.testing.assert_close(gradient, callback.kept[key])
    assert any("distillation_feature_loss" in key for key in measured) is (name not in ("ce", "kd"))


def test_variants_step_in_turn_with_the_same_batch(parts):
    steps = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def step(self, batch):
            steps.append((self.name, batch))
            return 0.5

    found = parts.rounds.run_rounds([Recorder("a"), Recorder("b")], ["x", "y"], 3, "test")
    assert steps == [("a", "x"), ("b", "x"), ("a", "y"), ("b", "y"), ("a", "x"), ("b", "x")]
    assert found == {"a": [0.5] * 3, "b": [0.5] * 3}


def test_the_published_form_is_left_out_where_it_does_not_fit(parts, monkeypatch):
    monkeypatch.setattr(parts.measure, "free_bytes", lambda device: 1000)
    pair = parts.pairs.find_pair("bert-6x384", tiny=True)
    found = parts.measure.measure_pair(pair, ("kd", "published"), "cpu", rounds=1)
    assert list(found["seconds"]) == ["kd"]
    assert found["skipped"]["published"] == "it needs about 0.0 GB, and 0.0 GB are free"
    assert found["skipped"]["ce"] == "not asked for with --variants"


def test_without_matplotlib_the_picture_says_what_to_install(parts, monkeypatch, tmp_path):
    from hf_semckd.errors import MissingDependencyError

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"hf-semckd\[plots\]"):
        parts.picture.draw({"pairs": {"p": record()}}, tmp_path / "step.png")


# ---- The command ---------------------------------------------------------------------------------------------------


def test_a_quick_run_measures_every_variant(parts, tmp_path, capsys):
    path = tmp_path / "quick.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--pairs", "bert-6x384", "resnet32x4-8x4"]
    done = subprocess.run([*command, "--output", str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    stored = json.loads(path.read_text())
    assert list(stored["pairs"]) == ["bert-6x384 (tiny)", "resnet32x4-8x4 (tiny)"]
    for pair in stored["pairs"].values():
        assert tuple(pair["seconds"]) == VARIANTS
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
    assert all("skipped" in second[name] for name in VARIANTS)

    assert "| bert-6x384 (tiny) |" in done.stdout and "| teacher forward |" in done.stdout
    call(parts, "--table", str(path))
    assert capsys.readouterr().out == done.stdout
    pytest.importorskip("matplotlib")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_growth_joins_the_file_and_leaves_the_pairs(parts, tmp_path, capsys):
    path = tmp_path / "step.json"
    path.write_text(json.dumps({"pairs": {"bert-6x384": record()}}))
    call(parts, "--quick", "--growth", "--output", str(path))
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
def test_a_wrong_argument_is_named(parts, arguments, words, capsys):
    with pytest.raises(SystemExit):
        call(parts, *arguments)
    assert words in capsys.readouterr().err
