"""A whole run, what it leaves, and what becomes of it when it stops, fails or is repeated."""

import io
import json
import logging
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from makers import assert_same_weights, weights
from recipe_parts import (
    KINDS,
    QUICK,
    command,
    interrupt_at,
    quick_evaluate,
    save_bert,
    save_gpt2,
    sentences,
    write_rows,
)
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForSequenceClassification, GPT2ForSequenceClassification

from hf_semckd.recipes import prepare, run

FILES = {"config.json", "model.safetensors", "tokenizer.json", "evaluation.txt", "evaluation.json", "report.html"}
FILES |= {"README.md", "recipe.json", "trainer_state.json"}


def student(folder):
    return load_file(folder / "model.safetensors")


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


@pytest.fixture
def recipe(teacher, rows, tmp_path, quick_table):
    """Runs a recipe with more flags, and returns its exit status; `out` is where."""

    def go(*flags, out=tmp_path / "out"):
        given = ("--teacher", teacher, "--dataset", rows, "--num_layers", 1, "--output_dir", out, *QUICK)
        return command("distill", *given, *flags)

    return go


@pytest.fixture(scope="module")
def finished(teacher, rows, tmp_path_factory):
    """The folder of a run, what it printed, and its exit status."""
    folder = tmp_path_factory.mktemp("run") / "out"
    out, err = io.StringIO(), io.StringIO()
    words = ("--teacher", teacher, "--dataset", rows, "--num_layers", 1, "--output_dir", folder, *QUICK, "--json")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(run, "evaluate", quick_evaluate)
        status = command("distill", *words)
    return folder, out.getvalue(), err.getvalue(), status, words


# ---- What a run leaves -------------------------------------------------------------------------------------------


def test_a_run_leaves_a_plain_student_with_its_table_report_and_card(finished):
    folder, _, _, status, _ = finished
    assert status == 0 and FILES <= files(folder)
    # Nothing that only resuming needs is left, and the teacher is not in there.
    assert not (folder / "start").exists() and not (folder / "teacher").exists()
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(model).__module__.startswith("transformers.") and model.config.num_hidden_layers == 1
    assert model.config.id2label == {0: "good", 1: "bad", 2: "odd"}
    table = (folder / "evaluation.txt").read_text()
    assert re.search(r"^teacher .*\nstudent ", table, re.MULTILINE)


def test_with_json_one_document_is_all_of_stdout(finished):
    folder, out, err, _, _ = finished
    told = json.loads(out)
    assert told["student"] == str(folder) and told["auto_class"] == "AutoModelForSequenceClassification"
    assert told["problems"] == [] and [row["model"] for row in told["evaluation"]["rows"]] == ["teacher", "student"]
    assert told["report"].startswith("file:///") and "student" in err and "AutoModelFor" in err


def test_a_log_has_few_lines_and_no_bars(finished):
    _, _, err, _, _ = finished
    assert not re.search(r"\d%\||it/s|\r|\{'", err)
    assert len([line for line in err.splitlines() if line.startswith("training")]) <= 4


def test_what_is_published_names_no_path_of_this_machine(finished, teacher, rows):
    folder, _, _, _, _ = finished
    private = (str(folder), str(folder.parent), str(teacher.parent), str(rows.parent))
    for name in ("README.md", "report.html", "evaluation.json", "config.json", "distillation_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        assert not [path for path in private if path in text], name


# ---- Again -----------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_trained_again(finished, monkeypatch, capsys):
    folder, out, _, _, words = finished
    before = times(folder)
    monkeypatch.setattr(run, "student_trainer", lambda *_: pytest.fail("trained again"))
    assert command("distill", *words) == 0
    assert json.loads(capsys.readouterr().out)["evaluation"] == json.loads(out)["evaluation"]
    assert command("distill", *words[:-1]) == 0
    assert "An earlier run has done all of this" in capsys.readouterr().out
    assert times(folder) == before


@pytest.mark.slow
def test_what_is_missing_is_made_again_without_training(recipe, tmp_path, monkeypatch):
    assert recipe() == 0
    before = student(tmp_path / "out")
    for name in ("report.html", "README.md", "evaluation.txt"):
        (tmp_path / "out" / name).unlink()
        monkeypatch.setattr(run, "_train", lambda *_: pytest.fail("trained again"))
        assert recipe() == 0
        assert (tmp_path / "out" / name).is_file()
    assert_same_weights(before, student(tmp_path / "out"))
    # Of the first training, which is what the report shows.
    assert "loss" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_another_metric_makes_another_table_of_the_same_student(recipe, tmp_path):
    assert recipe() == 0
    before = student(tmp_path / "out")
    assert recipe("--metric", "f1") == 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["metric"] == "f1"
    assert_same_weights(before, student(tmp_path / "out"))


def test_other_options_are_refused_and_free_ones_are_not(recipe, capsys):
    assert recipe("--seed", 1) == 0
    assert recipe("--seed", 2, "--learning_rate", "1e-3") == 2
    said = capsys.readouterr().err
    assert "seed was 1, is 2" in said and "learning_rate was not given, is 0.001" in said
    assert recipe("--seed", 1, "--logging_steps", 1, "--run_name", "other") == 0


def test_a_run_that_was_refused_can_be_corrected_in_the_same_folder(recipe, capsys):
    assert recipe("--label_column", "lable") == 2
    assert recipe("--student_layers", 7) == 2
    assert recipe() == 0, capsys.readouterr().err


# ---- Stopped -----------------------------------------------------------------------------------------------------

LONGER = ("--max_steps", 6, "--save_steps", 2, "--logging_steps", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "flags"),
    [
        ("student", ()),
        pytest.param("student", ("--init", "random", "--hidden_size", 8), marks=pytest.mark.slow),
        ("teacher", ("--teacher_epochs", 1, "--save_steps", 0.2)),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_student(recipe, tmp_path, monkeypatch, capsys, where, flags):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert recipe(*LONGER, *flags, out=whole) == 0
    with monkeypatch.context() as patch:
        place = run if where == "student" else prepare
        patch.setattr(place, "use_progress", interrupt_at(3))
        assert recipe(*LONGER, *flags, out=broken) == 130
    assert f"goes on from the last checkpoint in {broken}" in capsys.readouterr().out
    assert not (broken / "model.safetensors").exists()
    assert recipe(*LONGER, *flags, out=broken) == 0
    assert_same_weights(student(whole), student(broken))
    if where == "student":
        assert "goes on from checkpoint-2" in capsys.readouterr().out


@pytest.mark.slow
def test_a_new_student_is_the_same_whether_its_teacher_was_fine_tuned_before_or_just_now(
    recipe, tmp_path, monkeypatch
):
    """A run killed between both trainings: random numbers were drawn for the teacher's, and are not drawn again."""
    flags = (*LONGER, "--teacher_epochs", 1, "--init", "random")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert recipe(*flags, out=whole) == 0

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "cut_student", stop)
        assert recipe(*flags, out=broken) == 130
    torch.rand(7)
    assert recipe(*flags, out=broken) == 0
    assert_same_weights(student(whole), student(broken))


# ---- What fails later ----------------------------------------------------------------------------------------------


def fail(*_, **__):
    raise ValueError("something was wrong")


@pytest.mark.parametrize(
    ("part", "missing", "name"),
    [
        pytest.param("_evaluate", "evaluation.txt", "table", marks=pytest.mark.slow),
        ("_report", "report.html", "report"),
        pytest.param("_export", "onnx/model.onnx", "ONNX files", marks=pytest.mark.slow),
    ],
)
def test_a_failure_costs_only_itself(recipe, tmp_path, monkeypatch, capsys, caplog, part, missing, name):
    flags = ("--onnx",) if part == "_export" else ()
    if part == "_export":  # which the table would measure as well
        monkeypatch.setattr(run, "evaluate", lambda *a, onnx, **k: quick_evaluate(*a, onnx=False, **k))
    with monkeypatch.context() as patch:
        patch.setattr(run._Results, part, fail)
        assert recipe(*flags, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] == [f"{name}: something was wrong"]
    assert f"The student is saved, but the {name} failed. something was wrong" in caplog.text
    made = files(tmp_path / "out")
    assert missing not in made and (FILES - {missing, "evaluation.json"}) <= made


def test_a_card_or_a_push_that_fails_costs_only_itself(recipe, tmp_path, monkeypatch, capsys):
    from hf_semckd.training.publishing_trainer import PublishingTrainer

    with monkeypatch.context() as patch:
        patch.setattr(PublishingTrainer, "create_model_card", fail)
        assert recipe("--json") == 1
    assert json.loads(capsys.readouterr().out)["problems"] == ["card: something was wrong"]
    assert FILES - {"README.md"} <= files(tmp_path / "out")
    # The next run makes up for it.
    assert recipe() == 0 and (tmp_path / "out" / "README.md").is_file()
    pushes = []
    monkeypatch.setattr(PublishingTrainer, "init_hf_repo", lambda *_: None)
    monkeypatch.setattr(PublishingTrainer, "push_to_hub", lambda *_, **__: pushes.append(1) or fail())
    assert recipe("--push_to_hub") == 1
    assert pushes and "The student is saved" not in capsys.readouterr().out


@pytest.mark.parametrize("debug", [False, True])
def test_debug_shows_where_a_failed_part_came_from(recipe, monkeypatch, caplog, debug):
    monkeypatch.setattr(run._Results, "_evaluate", fail)
    assert recipe(*(["--debug"] if debug else [])) == 1
    assert "The student is saved, but the table failed. something was wrong" in caplog.text
    assert ("Traceback" in caplog.text and "in fail" in caplog.text) is debug
    assert not run.logger.isEnabledFor(logging.DEBUG)


# ---- Teachers that are elsewhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["offload", "device_map"])
def test_wherever_the_teacher_was_the_student_and_the_table_are_the_same(finished, recipe, tmp_path, placement):
    assert recipe("--teacher_placement", placement) == 0
    out = tmp_path / "out"
    assert FILES <= files(out)
    assert_same_weights(student(finished[0]), student(out))
    table, plain = (json.loads((path / "evaluation.json").read_text())["rows"] for path in (out, finished[0]))
    told = ("model", "runtime", "device", "quality", "agreement", "parameters", "disk_bytes")
    assert [[row[name] for name in told] for row in table] == [[row[name] for name in told] for row in plain]
    assert "Student and teacher were not compared" not in (out / "report.html").read_text()
    # Made anew by another run, which has not trained.
    (out / "evaluation.txt").unlink()
    assert recipe("--teacher_placement", placement) == 0 and (out / "evaluation.txt").is_file()


def test_a_teacher_that_was_fine_tuned_and_offloaded_is_in_the_table(recipe, tmp_path):
    assert recipe("--teacher_placement", "offload", "--teacher_epochs", 1) == 0
    table = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]
    assert table[0]["model"] == "teacher" and table[0]["disk_bytes"] > table[1]["disk_bytes"]


def test_a_student_that_is_divided_is_in_the_table_as_it_was_saved(recipe, finished, tmp_path, monkeypatch):
    train = run._train

    def divide(trainer, folder, voice):
        train(trainer, folder, voice)
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
        fully_shard(trainer.student, mesh=init_device_mesh("cpu", (1,)))

    monkeypatch.setattr(run, "_train", divide)
    # Once for the table, and once for the files.
    monkeypatch.setattr(run, "evaluate", lambda *a, onnx, **k: quick_evaluate(*a, onnx=False, **k))
    try:
        assert recipe("--onnx") == 0
    finally:
        dist.destroy_process_group()
    table, plain = (
        json.loads((path / "evaluation.json").read_text())["rows"] for path in (tmp_path / "out", finished[0])
    )
    assert [row["quality"] for row in table] == [row["quality"] for row in plain if row["runtime"] == "PyTorch"]
    assert (tmp_path / "out" / "onnx" / "model_int8.onnx").is_file()


def test_an_offloaded_gpt2_without_a_padding_token_is_in_the_table(tmp_path, quick_table):
    teacher = save_gpt2(tmp_path / "gpt2", GPT2ForSequenceClassification, num_labels=3)
    data, names = write_rows(tmp_path / "rows.jsonl", sentences(24)), ("--class_names", "good", "bad", "odd")
    given = ("--teacher", teacher, "--dataset", data, "--num_layers", 1, "--output_dir", tmp_path / "out", *names)
    assert command("distill", *given, *QUICK, "--teacher_placement", "offload") == 0


# ---- Other students ------------------------------------------------------------------------------------------------


def test_a_gpt2_without_a_padding_token_is_distilled(tmp_path, quick_table):
    teacher = save_gpt2(tmp_path / "gpt2", GPT2ForSequenceClassification, num_labels=3)
    data = write_rows(tmp_path / "rows.jsonl", sentences(24))
    names = ("--class_names", "good", "bad", "odd")
    given = ("--teacher", teacher, "--dataset", data, "--num_layers", 1, "--output_dir", tmp_path / "out", *names)
    assert command("distill", *given, *QUICK) == 0
    found = GPT2ForSequenceClassification.from_pretrained(tmp_path / "out")
    assert found.config.pad_token_id == 3 and found.config.id2label == {0: "good", 1: "bad", 2: "odd"}


@pytest.mark.slow
def test_two_teachers_teach_one_student(teacher, rows, tmp_path, quick_table):
    other = save_bert(tmp_path / "other", names=("GOOD", "BAD", "ODD"), layers=2)
    new = Path(save_bert(tmp_path / "new", layers=1)) / "config.json"
    given = ("--teacher", teacher, other, "--dataset", rows, "--student", new, "--output_dir", tmp_path / "out")
    assert command("distill", *given, *QUICK) == 0
    assert (tmp_path / "out" / "evaluation.txt").read_text().count("\nteacher 2") == 1
    start = weights(AutoModelForSequenceClassification.from_pretrained(tmp_path / "new"))
    assert not torch.equal(start["classifier.weight"], student(tmp_path / "out")["classifier.weight"])


def labels_of(kind, place):
    several = [KINDS[place % 3], KINDS[(place + 1) % 3]][: 1 + place % 2]
    return {"number": place / 7, "several": several, "one": KINDS[place % 3]}[kind]


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize(
    ("kind", "problem", "metric"),
    [
        ("number", {"names": 1, "problem_type": "regression"}, "pearson"),
        ("several", {"problem_type": "multi_label_classification"}, "accuracy"),
        ("one", {}, "accuracy"),
    ],
)
def test_labels_of_every_kind_are_distilled(tmp_path, quick_table, kind, problem, metric, epochs):
    source = save_bert(tmp_path / "teacher", layers=2, **problem)
    rows = [{"premise": row["text"], "hypothesis": "it was", "label": labels_of(kind, place)}
            for place, row in enumerate(sentences(40))]  # fmt: skip
    data, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    given = (
        "--teacher",
        source,
        "--dataset",
        data,
        "--num_layers",
        1,
        "--output_dir",
        out,
        "--teacher_epochs",
        epochs,
    )
    assert command("distill", *given, *QUICK) == 0
    found = AutoModelForSequenceClassification.from_pretrained(out)
    assert found.config.problem_type == problem.get("problem_type", found.config.problem_type)
    assert found.config.num_labels == (1 if kind == "number" else 3)
    told = json.loads((out / "evaluation.json").read_text())
    assert told["metric"] == metric
