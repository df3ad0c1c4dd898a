"""`hf-semckd distill`: what is printed where, exit statuses, processes that are killed, and several of them."""

import json
import re
import signal

import pytest
import torch
from datasets import Dataset
from launching import TESTS, python, torchrun
from makers import assert_same_weights
from recipe_parts import command, interrupt_at, quick_evaluate, save_bert, sentences, write_rows
from safetensors.torch import load_file

from hf_semckd.recipes import run

WORKER = TESTS / "recipe_worker.py"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A recipe with its teacher and its data."""
    folder = tmp_path_factory.mktemp("parts")
    save_bert(folder / "teacher", layers=3)
    write_rows(folder / "rows" / "train.jsonl", sentences(24))
    write_rows(folder / "rows" / "test.jsonl", sentences(6))
    Dataset.from_list(sentences(24)).save_to_disk(folder / "saved")
    lines = ["# Needs: something.", f"teacher: {folder / 'teacher'}", f"dataset: {folder / 'rows'}"]
    lines += ["student: {num_layers: 1}", "max_steps: 6", "save_steps: 2", "eval_strategy: no", "use_cpu: yes"]
    (folder / "recipe.yaml").write_text("\n".join([*lines, "per_device_train_batch_size: 4", ""]))
    return folder


def snapshot(*folders):
    return {
        path: path.stat().st_mtime_ns for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()
    }


def weights_of(folder):
    return load_file(folder / "model.safetensors")


# ---- Without training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["rows", "saved"])
def test_a_dry_run_tells_all_and_writes_nothing(parts, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = snapshot(parts, tmp_path)
    flags = ("--dataset", parts / data, "--dry-run")
    assert command("distill", parts / "recipe.yaml", *flags) == 0
    out = capsys.readouterr().out
    for said in ("text-classification: text -> label, 3 classes", "cut out of the teacher", "layer", "time", "memory"):
        assert said in out
    assert "will be in outputs/recipe; nothing was written now" in out and "Interrupted" not in out
    assert snapshot(parts, tmp_path) == before and not list(tmp_path.iterdir())


def test_a_dry_run_with_a_teacher_to_fine_tune_prints_one_document(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command("distill", parts / "recipe.yaml", "--dry-run", "--json", "--teacher_epochs", 2) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    # 24 rows in batches of 4, for two epochs, and six steps that the recipe asks for.
    assert (told["samples"], told["steps"]) == (24, 6) and told["step"]["seconds"] > 0
    assert told["teacher"][1] == 12
    assert "fine-tune the teacher" in err and not list(tmp_path.iterdir())


# ---- What is said ------------------------------------------------------------------------------------------------


def test_what_a_recipe_needs_is_said_where_it_is_missing(parts, tmp_path, capsys):
    path = tmp_path / "other.yaml"
    path.write_text((parts / "recipe.yaml").read_text().replace(str(parts / "rows"), str(tmp_path / "none")))
    assert command("distill", path) == 2
    err = capsys.readouterr().err
    assert "no such file or folder here" in err and f"{path} says:\nNeeds: something." in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["none.yaml"], "none.yaml cannot be read"),
        ([], "There is no teacher"),
        (["--teacher", "t"], "There is no dataset"),
        (["--teacher", "t", "--dataset", "d"], "A student is either given, or cut out"),
        (["--teachr", "t"], "did you mean --teacher"),
        (["--dryrun"], "did you mean --dry-run"),
        (["--dry_run"], "did you mean --dry-run"),
    ],
)
def test_mistakes_are_told_with_status_2(flags, said, capsys):
    assert command("distill", *flags) == 2
    out, err = capsys.readouterr()
    assert said in err and not out


def test_an_interruption_says_how_to_go_on(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "use_progress", interrupt_at(3))
    assert command("distill", parts / "recipe.yaml", "--output_dir", tmp_path / "out") == 130
    out = capsys.readouterr().out
    assert f"Interrupted. The same command goes on from the last checkpoint in {tmp_path / 'out'}." in out


def test_an_interruption_before_training_does_not_speak_of_a_checkpoint(parts, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "read_rows", stop)
    assert command("distill", parts / "recipe.yaml", "--output_dir", tmp_path / "out") == 130
    assert "checkpoint" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_log_of_many_steps_has_few_lines(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "evaluate", quick_evaluate)
    flags = ("--max_steps", 200, "--save_steps", 100, "--logging_steps", 1, "--output_dir", tmp_path / "out")
    assert command("distill", parts / "recipe.yaml", *flags) == 0
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("training")]
    assert 10 <= len(lines) <= 21 and re.match(r"training  step \d+/200  loss [\d.]+ .* left\)$", lines[3])
    assert not re.search(r"\d%\||it/s", out + err)


# ---- Processes ---------------------------------------------------------------------------------------------------


def distill(parts, out, *flags, start=python, **environment):
    words = (WORKER, "distill", parts / "recipe.yaml", "--output_dir", out, *flags)
    return start(*words, cwd=out.parent, **environment)


@pytest.mark.slow
def test_the_command_prints_one_document_and_no_bar(parts, tmp_path):
    done = distill(parts, tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["student"] == str(tmp_path / "out")
    assert not re.search(r"\d%\||it/s|\r|Traceback", done.stderr), done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_a_killed_run_goes_on_to_the_same_student(parts, tmp_path, where):
    flags = ("--teacher_epochs", 1) if where == "teacher" else ()
    assert distill(parts, tmp_path / "whole", *flags).returncode == 0
    killed = distill(parts, tmp_path / "broken", *flags, KILL_IN=where, KILL_AT="3")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    kept = tmp_path / "broken" / ("teacher" if where == "teacher" else ".")
    assert (kept / "checkpoint-2" / "trainer_state.json").is_file()
    again = distill(parts, tmp_path / "broken", *flags)
    assert again.returncode == 0, again.stderr
    assert_same_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken"))


@pytest.mark.slow
def test_two_processes_make_one_student_and_one_set_of_files(parts, tmp_path):
    done = distill(parts, tmp_path / "out", "--teacher_epochs", 1, "--json", start=torchrun)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("world size 2") == 2
    told = json.loads(done.stdout)
    assert told["problems"] == [] and [row["model"] for row in told["evaluation"]["rows"]] == ["teacher", "student"]
    alone = tmp_path / "alone"
    assert distill(parts, alone, "--teacher_epochs", 1).returncode == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in alone.iterdir()}
    # Each line is said once.
    assert len([line for line in done.stderr.splitlines() if line.startswith("data")]) == 1
    assert weights_of(tmp_path / "out").keys() == weights_of(alone).keys()


@pytest.mark.slow
def test_a_teacher_divided_among_two_processes_is_in_the_table(parts, tmp_path):
    done = distill(parts, tmp_path / "out", "--json", "--teacher_placement", "shard", start=torchrun)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["problems"] == [] and [row["model"] for row in told["evaluation"]["rows"]] == ["teacher", "student"]
    assert all(row["disk_bytes"] > 0 for row in told["evaluation"]["rows"])
    # As with a teacher that each process has all of, to rounding.
    whole = tmp_path / "whole"
    assert distill(parts, whole, start=torchrun).returncode == 0
    found, expected = weights_of(tmp_path / "out"), weights_of(whole)
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


@pytest.mark.slow
def test_a_dry_run_in_two_processes_is_refused_before_anything_is_loaded(parts, tmp_path):
    done = distill(parts, tmp_path / "out", "--dry-run", start=torchrun)
    assert done.returncode != 0 and done.stderr.count("A training is planned in one process") == 2
    assert "torchrun: hf-semckd distill recipe.yaml --dry-run" in done.stderr and not done.stdout
    assert not (tmp_path / "out").exists()
