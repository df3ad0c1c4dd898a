"""A teacher that was cached is not loaded again: the same losses, and loading as soon as a sample is missing."""

from unittest import mock

import pytest
import torch
from makers import bert, config, images, texts, vit
from tiny import fit

from hf_semckd import SemCKDTrainer
from hf_semckd import trainer as trainer_module
from hf_semckd.deferred import TeacherNote, describe_extra_tokens, read_note, source_digest, write_note
from hf_semckd.features import FeatureSpec


def distil(folder, source, *, text=False, rows=None, **args):
    rows = rows or (texts(8) if text else images(8))
    settings = {"teacher_cache_dir": str(folder / "cache"), "max_steps": 3, "logging_steps": 1, **args}
    trainer = SemCKDTrainer(
        bert() if text else vit(), config(folder / "out", **settings), teacher_model=str(source), train_dataset=rows
    )
    return trainer


def run(*args, **kwargs):
    """Train; return the losses and how often a teacher was loaded."""
    with mock.patch.object(trainer_module, "load_model", wraps=trainer_module.load_model) as load:
        trainer = distil(*args, **kwargs)
        fit(trainer)
    loads = sum(call.args[1] == "teacher" for call in load.call_args_list)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], loads, trainer


@pytest.fixture(params=["image", "text"])
def text(request):
    return request.param == "text"


@pytest.fixture
def source(tmp_path, text):
    model = bert(3, 24, seed=9) if text else vit(3, 24, seed=9)
    model.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_cached_teacher_is_not_loaded_and_gives_the_same_losses(tmp_path, source, text):
    live, _, _ = run(tmp_path, source, text=text, teacher_cache_dir=None)
    filled, first, _ = run(tmp_path, source, text=text)
    cached, second, trainer = run(tmp_path, source, text=text)
    assert (first, second) == (1, 0)
    assert filled == pytest.approx(live, rel=1e-5) and cached == pytest.approx(live, rel=1e-5)
    assert all(entry.is_meta for entry in trainer.teacher.parameters())


def test_a_missing_sample_loads_the_teacher(tmp_path, source, text):
    run(tmp_path, source, text=text)
    rows = texts(8, seed=77) if text else images(8, seed=77)
    live, _, _ = run(tmp_path, source, text=text, rows=rows, teacher_cache_dir=None)
    loss, loads, trainer = run(tmp_path, source, text=text, rows=rows)
    assert loads == 1 and not any(entry.is_meta for entry in trainer.teacher.parameters())
    assert loss == pytest.approx(live, rel=1e-5)


def test_other_weights_or_other_questions_load_the_teacher(tmp_path, source, text):
    run(tmp_path, source, text=text)
    assert run(tmp_path, source, text=text, teacher_layers=[1, 3])[1] == 1
    assert run(tmp_path, source, text=text, logit_weight=0.0)[1] == 1
    changed = bert(3, 24, seed=10) if text else vit(3, 24, seed=10)
    changed.save_pretrained(source)
    assert run(tmp_path, source, text=text)[1] == 1


def test_a_note_comes_back_as_it_was_and_damage_is_absence(tmp_path):
    specs = [FeatureSpec("1", "tokens", 8, 17, (4, 4), 1), FeatureSpec("2", "map", 8, 4, (2, 2))]
    note = TeacherNote("abc", [1, 2], specs, [None, None], (3,))
    write_note(tmp_path, "digest", "asked", note)
    write_note(tmp_path, "digest", "else", note)
    assert read_note(tmp_path, "digest", "asked") == note == read_note(tmp_path, "digest", "else")
    assert read_note(tmp_path, "digest", "other") is None and read_note(tmp_path, "nothing", "asked") is None
    next(tmp_path.rglob("manifest.json")).write_text('{"asked": {"specs": 3}}')
    assert read_note(tmp_path, "digest", "asked") is None


def test_sequences_take_the_length_of_the_batch():
    specs = [FeatureSpec("1", "tokens", 8, 12), FeatureSpec("2", "tokens", 8, 1)]
    mask = torch.ones(2, 10)
    extra = describe_extra_tokens(specs, {"attention_mask": mask})
    assert extra == [2, None]
    note = TeacherNote("abc", [1, 2], specs, extra, None)
    assert [spec.length for spec in note.specs_for({"attention_mask": torch.ones(2, 7)})] == [9, 1]


def test_a_digest_follows_the_files_and_only_they(tmp_path):
    vit().save_pretrained(tmp_path / "one")
    vit().save_pretrained(tmp_path / "two")
    vit(seed=5).save_pretrained(tmp_path / "three")
    one, two, three = (source_digest(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two != three
    assert source_digest(vit()) is None and source_digest("nobody/nothing") is None
    assert source_digest(tmp_path) is None
