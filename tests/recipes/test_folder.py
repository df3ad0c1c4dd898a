"""Whose an output folder is, and how far its training went."""

import hashlib
import json

import pytest
from makers import bert
from safetensors.numpy import save_file

from hf_semckd.errors import ConfigurationError
from hf_semckd.recipes.folder import RECIPE, START, TEACHER, RunFolder


@pytest.fixture
def folder(tmp_path):
    return RunFolder(str(tmp_path / "out"))


def checkpoint(folder, step, whole=True):
    place = folder.path / f"checkpoint-{step}"
    place.mkdir(parents=True)
    if whole:
        (place / "trainer_state.json").write_text("{}")
        save_file({}, place / "model.safetensors")


def test_a_new_folder_is_claimed_by_the_main_process(folder):
    folder.claim({"seed": 1}, is_main=False)
    assert not folder.path.exists()
    folder.claim({"seed": 1, "run_name": "x"}, is_main=True)
    assert json.loads((folder.path / RECIPE).read_text()) == {"options": {"seed": "1"}, "trained": False}


def test_the_same_options_are_welcome_in_any_order_and_with_free_ones(folder):
    folder.claim({"seed": 1, "learning_rate": 1e-3}, is_main=True)
    checkpoint(folder, 1)
    folder.claim({"learning_rate": 0.001, "seed": 1, "logging_steps": 3, "output_dir": "elsewhere"}, is_main=True)


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ({"seed": 2}, "seed was 1, is 2"),
        ({}, "seed was 1, is not given"),
        ({"seed": 1, "num_layers": [2]}, r"num_layers was not given, is \[2\]"),
    ],
)
@pytest.mark.parametrize("work", ["checkpoint", "teacher", "teacher's checkpoint", "student"])
def test_other_options_are_refused_once_anything_is_trained(folder, after, said, work):
    folder.claim({"seed": 1}, is_main=True)
    if work == "checkpoint":
        checkpoint(folder, 3)
    elif work == "teacher's checkpoint":
        checkpoint(RunFolder(str(folder.path / TEACHER)), 3)
    elif work == "teacher":
        (folder.path / TEACHER).mkdir()
        folder.mark_ready(TEACHER)
    else:
        (folder.path / "config.json").write_text("{}")
        folder.finish()
    with pytest.raises(ConfigurationError, match=f"(?s)other options.*{said}"):
        folder.claim(after, is_main=True)


def test_other_options_are_taken_where_nothing_is_trained_and_the_cut_student_goes(folder):
    folder.claim({"seed": 1}, is_main=True)
    (folder.path / START).mkdir()
    folder.mark_ready(START)
    folder.claim({"seed": 2}, is_main=True)
    assert folder.ready(START) is None
    assert json.loads((folder.path / RECIPE).read_text())["options"] == {"seed": "2"}


def test_a_folder_that_no_recipe_made_is_refused(folder):
    bert().save_pretrained(folder.path)
    with pytest.raises(ConfigurationError, match="something that no recipe made"):
        folder.claim({}, is_main=True)


@pytest.mark.parametrize("notes", ["{", "[]", '{"options": 3}', "\x00"])
def test_damaged_notes_are_refused(folder, notes):
    folder.path.mkdir()
    (folder.path / RECIPE).write_text(notes)
    with pytest.raises(ConfigurationError, match="notes of the output folder cannot be read"):
        folder.claim({}, is_main=True)


def test_the_newest_checkpoint_is_that_of_the_most_steps_that_is_whole(folder):
    assert folder.newest_checkpoint() is None
    for step in (9, 10, 2):
        checkpoint(folder, step)
    checkpoint(folder, 11, whole=False)
    (folder.path / "checkpoint-last").mkdir()
    (folder.path / "checkpoint-last" / "trainer_state.json").write_text("{}")
    assert folder.newest_checkpoint() == str(folder.path / "checkpoint-10")


def test_a_model_is_ready_when_it_is_marked(folder):
    (folder.path / START).mkdir(parents=True)
    assert folder.ready(START) is None
    folder.mark_ready(START)
    assert folder.ready(START) == str(folder.path / START)


def test_finished_is_what_is_noted_and_there(folder):
    folder.claim({"seed": 1}, is_main=True)
    (folder.path / START).mkdir()
    (folder.path / "model.safetensors").write_bytes(b"weights")
    folder.finish()
    assert not folder.trained and not (folder.path / START).exists()
    (folder.path / "config.json").write_text("{}")
    assert folder.trained
    notes = json.loads((folder.path / RECIPE).read_text())
    digest = hashlib.sha256(b"weights").hexdigest()
    assert notes == {"options": {"seed": "1"}, "trained": True, "weights": {"model.safetensors": digest}}


def test_other_weights_in_place_of_those_that_were_trained_are_noticed(folder):
    folder.claim({}, is_main=True)
    (folder.path / "model.safetensors").write_bytes(b"weights")
    folder.finish()
    folder.check_weights()
    (folder.path / "model.safetensors").write_bytes(b"others!")
    with pytest.raises(ConfigurationError, match="is not the one that was trained"):
        folder.check_weights()
