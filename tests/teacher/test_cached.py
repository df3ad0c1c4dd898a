"""A teacher that was cached is not loaded again: the same losses, and loading as soon as a sample is missing."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from makers import LABELS, bert, config, distiller, gpt2, images, texts, vit
from tiny import fit

from hf_semckd import DistillationTrainer, SemCKDTrainer
from hf_semckd.errors import TeacherOutputError
from hf_semckd.features.layers import FeatureSpec
from hf_semckd.teacher.cached import CachedTeacher
from hf_semckd.teacher.notes import TeacherNote, TeacherRequest, read_note, source_digest, write_note
from hf_semckd.teacher.teacher import Teacher
from hf_semckd.training import pair as pair_module


def distill(folder, source, *, text=False, rows=None, **args):
    rows = rows or (texts(8) if text else images(8))
    settings = {"teacher_cache_dir": str(folder / "cache"), "max_steps": 3, "logging_steps": 1, **args}
    trainer = SemCKDTrainer(
        bert() if text else vit(), config(folder / "out", **settings), teacher_model=str(source), train_dataset=rows
    )
    return trainer


def run(*args, **kwargs):
    """Train; return the losses and how often a teacher was loaded."""
    with mock.patch.object(pair_module, "load_model", wraps=pair_module.load_model) as load:
        trainer = distill(*args, **kwargs)
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
    assert all(entry.is_meta for entry in trainer.pair.teacher.model.parameters())
    assert not any(entry.is_meta for entry in trainer.teacher.parameters())


@pytest.mark.parametrize(("head", "given"), [("classes", {}), ("words", {}), ("words", {"teacher_cache_samples": 0})])
def test_a_cache_that_is_not_full_is_opened_again_and_again(tmp_path, head, given):
    """Each time the teacher is loaded for what is missing, though a note tells how it looks."""
    words = head == "words"
    (gpt2(3, 24, seed=9) if words else bert(3, 24, seed=9)).save_pretrained(tmp_path / "teacher")
    rows = texts(24, labels="input", types=False) if words else texts(24)
    notes = []
    for _ in range(4):
        args = {"teacher_cache_dir": str(tmp_path / "cache"), "max_steps": 1, **given}
        student = gpt2() if words else bert()
        fit(distiller(tmp_path, args, model=student, teacher_model=str(tmp_path / "teacher"), train_dataset=rows))
        (path,) = tmp_path.rglob("manifest.json")
        notes.append(json.loads(path.read_text()))
    assert all(found == notes[0] for found in notes)
    (note,) = notes[0].values()
    assert note["logits"] == [gpt2().config.vocab_size if words else 3]


def test_what_is_not_finite_is_never_stored(tmp_path):
    broken = vit(3, 24, seed=9)
    real = broken.forward

    def sometimes(pixel_values, **kwargs):
        outputs = real(pixel_values=pixel_values, **kwargs)
        outputs.logits[pixel_values.mean((1, 2, 3)) == pixel_values.mean((1, 2, 3)).max()] = float("nan")
        return outputs

    settings = config(tmp_path / "out", teacher_cache_dir=str(tmp_path / "cache"), max_steps=3)
    trainer = SemCKDTrainer(vit(), settings, teacher_model=broken, train_dataset=images(8))
    broken.forward = sometimes
    with pytest.raises(TeacherOutputError, match="logits are not finite"):
        trainer.train()
    broken.forward = real
    healthy = SemCKDTrainer(vit(), settings, teacher_model=broken, train_dataset=images(8))
    assert len(healthy.pair.teacher.cache.store) == 0
    fit(healthy)


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Path(config(tmp_path, teacher_cache_dir="~/cache").teacher_cache_dir) == tmp_path / "cache"


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
    note = TeacherNote("abc", [1, 2], specs, None, (3,), True)
    write_note(tmp_path, "digest", "asked", note)
    write_note(tmp_path, "digest", "else", note)
    assert read_note(tmp_path, "digest", "asked") == note == read_note(tmp_path, "digest", "else")
    assert read_note(tmp_path, "digest", "other") is None and read_note(tmp_path, "nothing", "asked") is None
    changed = TeacherNote("def", [1, 2], specs, 5, None, False)
    write_note(tmp_path, "digest", "asked", changed)
    assert read_note(tmp_path, "digest", "asked") == changed and read_note(tmp_path, "digest", "else") == note
    (path,) = (entry for entry in tmp_path.rglob("*") if entry.is_file())
    assert path.name == "manifest.json"
    for damaged in (b'{"asked": {"specs": 3}}', b'{"layers": [', b"\xff\xfe", b"[1]", b""):
        path.write_bytes(damaged)
        assert read_note(tmp_path, "digest", "asked") is None


@pytest.mark.parametrize(
    "change",
    [
        {"specs": {"channels": 10**9}},
        {"specs": {"channels": 25}},
        {"specs": {"channels": "24"}},
        {"specs": {"length": 2**40}},
        {"specs": {"length": -1}},
        {"specs": {"grid": [10**6, 10**6]}},
        {"specs": {"prefix": -2}},
        {"specs": {"kind": "cube"}},
        {"logits": [2**40]},
        {"logits": []},
        {"layers": 7},
        {"weights": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("text", [False], ids=["image"])
def test_a_note_that_cannot_be_true_costs_a_loading_and_no_memory(change, tmp_path, source, text, caplog):
    expected, _, _ = run(tmp_path, source)
    (path,) = (tmp_path).rglob("manifest.json")
    notes = json.loads(path.read_text())
    for note in notes.values():
        for spec in note["specs"]:
            spec.update(change.get("specs", {}))
        note.update({name: value for name, value in change.items() if name != "specs"})
    path.write_text(json.dumps(notes))
    loss, loads, _ = run(tmp_path, source)
    assert loads == 1 and loss == expected
    assert "cannot be true" in caplog.text


def test_sequences_take_the_length_of_the_batch():
    specs = [FeatureSpec("1", "tokens", 8, 12), FeatureSpec("2", "tokens", 8, 1)]
    note = TeacherNote("abc", [1, 2], specs, 10, None, True)
    assert [spec.length for spec in note.specs_for({"attention_mask": torch.ones(2, 7)})] == [9, 1]
    assert note.specs_for({"pixel_values": torch.ones(2, 3, 4, 4)}) == specs


def test_a_digest_follows_the_files_and_only_they(tmp_path):
    vit().save_pretrained(tmp_path / "one")
    vit().save_pretrained(tmp_path / "two")
    vit(seed=5).save_pretrained(tmp_path / "three")
    one, two, three = (source_digest(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two != three
    assert source_digest(vit()) is None and source_digest("nobody/nothing") is None
    assert source_digest(tmp_path) is None


def test_a_known_teacher_is_there_when_it_is_asked_for(tmp_path, source, text):
    run(tmp_path, source, text=text)
    _, loads, trainer = run(tmp_path, source, text=text)
    assert loads == 0
    with torch.no_grad():
        logits = trainer.teacher(**{k: v[None] for k, v in (texts if text else images)(1)[0].items() if k != "labels"})
    assert logits.logits.shape == (1, LABELS) and logits.logits.isfinite().all()


def blocks(length):
    """Return texts without padding and without a mask, all of one length."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 30, (length,), generator=generator) for _ in range(8)]
    return [{"input_ids": row, "labels": row} for row in rows]


def test_another_length_without_a_mask_is_looked_at_anew(tmp_path):
    gpt2(3, 24, seed=9).save_pretrained(tmp_path / "teacher")
    losses = {}
    for cached in (False, True):
        for length in (9, 12, 9):
            settings = {"teacher_cache_dir": str(tmp_path / "cache") if cached else None, "max_steps": 2}
            args = config(tmp_path / "out", logging_steps=1, **settings)
            teacher = str(tmp_path / "teacher")
            trainer = SemCKDTrainer(gpt2(), args, teacher_model=teacher, train_dataset=blocks(length))
            fit(trainer)
            losses[cached, length] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    for length in (9, 12):
        assert losses[True, length] == pytest.approx(losses[False, length], rel=1e-5)


def test_switching_features_on_asks_anew(tmp_path, source, text):
    run(tmp_path, source, text=text, feature_weight=0.0)
    trainer = distill(tmp_path, source, text=text, feature_weight=0.0)
    trainer.args.feature_weight = 1.0
    trainer._build()
    assert trainer.feature_loss is not None and len(trainer.teacher_layer_names) == 3


def test_a_method_with_layers_of_its_own_does_not_take_the_note_of_one_with_blocks(tmp_path):
    """Both leave the teacher to the cache; the second must look at attention modules all the same."""
    bert(3, 24, seed=9).save_pretrained(tmp_path / "teacher")

    def train(name):
        args = config(tmp_path / "out", logging_steps=1, max_steps=2, teacher_cache_dir=str(tmp_path / "cache"))
        trainer = DistillationTrainer(
            bert(), args, teacher_model=str(tmp_path / "teacher"), train_dataset=texts(8), feature_loss=name
        )
        fit(trainer)
        return trainer

    assert train("semckd").teacher_layer_names == ["1", "2", "3"]
    assert [name.rpartition(".")[2] for name in train("minilm").teacher_layer_names] == ["query", "key", "value"]
    assert [name.rpartition(".")[2] for name in train("minilm").teacher_layer_names] == ["query", "key", "value"]


def test_a_missing_sample_joins_those_of_a_left_padded_batch(tmp_path):
    """Alone, the sample without padding would be stored as one of a right-padded batch."""
    live = Teacher(bert(3, 24, seed=9), [1, 2])
    cached = CachedTeacher(live, tmp_path, request=TeacherRequest("", None, "auto", True, True))
    rows = torch.tensor([[3, 4, 5, 6], [0, 7, 8, 9], [0, 0, 5, 4]])

    def batch(*members):
        ids = rows[list(members)]
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    described = cached.describe(batch(0, 1, 2), logits=True, features=True)
    cached.open(batch(0, 1, 2), described, kept="", logits=True, features=True)
    cached.run(batch(1, 2), logits=True, features=True)
    for members in ((0, 1), (2, 0), (1, 2, 0)):
        found, expected = (teacher.run(batch(*members), logits=True, features=True) for teacher in (cached, live))
        torch.testing.assert_close(found.logits, expected.logits)
        torch.testing.assert_close(list(found.features.tensors()), list(expected.features.tensors()))
