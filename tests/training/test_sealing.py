"""training/sealing.py: what is whole, what is passed over, and what is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from makers import distiller, images, vit
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_semckd.errors import CheckpointError, NonFiniteLossError
from hf_semckd.training.sealing import SEAL, break_seal, check_whole, checkpoint_to_resume, newest_whole, seal

EACH = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sealed")
    distiller(folder, EACH).train()
    return folder


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_every_file_of_a_checkpoint_is_under_its_seal(run):
    for folder in run.glob("checkpoint-*"):
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert set(json.loads((folder / SEAL).read_text())) == files - {SEAL}
        assert {"model.safetensors", "optimizer.pt", "feature_loss.safetensors", "trainer_state.json"} < files
        check_whole(folder)
    assert len(list(run.glob("checkpoint-*"))) == 3


def damages(folder, name):
    """Yield the file deleted, emptied, cut and with one other bit, and put it back each time."""
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    yield "deleted"
    for kind, changed in {
        "emptied": b"",
        "cut": content[:-1],
        "flipped": bytes([content[0] ^ 1]) + content[1:],
        "flipped at the end": content[:-1] + bytes([content[-1] ^ 1]),
    }.items():
        path.write_bytes(changed)
        yield kind
    path.write_bytes(content)


def test_any_damage_of_any_file_is_refused_by_its_name_and_passed_over_by_true(run, caplog):
    newest = run / "checkpoint-3"
    tried = 0
    for name in json.loads((newest / SEAL).read_text()):
        for kind in damages(newest, name):
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                checkpoint_to_resume(str(newest), run)
            caplog.clear()
            assert checkpoint_to_resume(True, run) == str(run / "checkpoint-2"), (name, kind)
            assert "checkpoint-3 is passed over" in caplog.text and name in caplog.text
            tried += 1
    assert tried >= 5 * 6
    check_whole(newest)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model.safetensors": 3}', '{"a": {"bytes": "1", "sha256": 2}}'])
def test_a_broken_seal_is_no_seal(content, run):
    (run / "checkpoint-3" / SEAL).write_text(content)
    with pytest.raises(CheckpointError, match=SEAL):
        check_whole(run / "checkpoint-3")
    assert newest_whole(run) == str(run / "checkpoint-2")


def test_what_was_killed_while_it_was_saved_is_passed_over(run, caplog):
    half = run / "checkpoint-4"
    half.mkdir()
    shutil.copy(run / "checkpoint-3" / "model.safetensors", half)
    assert newest_whole(run) == str(run / "checkpoint-3") and "checkpoint-4 is passed over" in caplog.text
    # All but the seal: an earlier version wrote no more.
    (run / "checkpoint-3" / SEAL).unlink()
    assert newest_whole(run) == str(run / "checkpoint-3")


def test_what_is_being_written_is_passed_over_whatever_is_there(run):
    break_seal(run / "checkpoint-3")
    with pytest.raises(CheckpointError, match="not all was written"):
        check_whole(run / "checkpoint-3")
    assert newest_whole(run) == str(run / "checkpoint-2")
    seal(run / "checkpoint-3")
    assert newest_whole(run) == str(run / "checkpoint-3")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_without_a_seal_the_formats_own_checks_count(name, run):
    (run / "checkpoint-3" / SEAL).unlink()
    path = run / "checkpoint-3" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        check_whole(run / "checkpoint-3")


def test_without_a_seal_a_checkpoint_without_weights_is_refused_and_passed_over(run, caplog):
    newest = run / "checkpoint-3"
    (newest / SEAL).unlink()
    (newest / "model.safetensors").unlink()
    trainer = distiller(run, {**EACH, "max_steps": 4})
    with pytest.raises(CheckpointError, match="checkpoint-3: it holds no weights"):
        trainer.train(resume_from_checkpoint=str(newest))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert "checkpoint-3 is passed over: it holds no weights" in caplog.text
    assert "goes on from checkpoint-2" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "adapter_model.safetensors",
        "adapter_model.bin",
        "second/adapter_model.safetensors",
        "pytorch_model_fsdp.bin",
        "pytorch_model_fsdp_0/__0_0.distcp",
        "global_step3/mp_rank_00_model_states.pt",
    ],
)
def test_without_a_seal_weights_of_other_kinds_count(name, run):
    newest = run / "checkpoint-3"
    (newest / SEAL).unlink()
    (newest / name).parent.mkdir(exist_ok=True)
    (newest / "model.safetensors").rename(newest / name)
    check_whole(newest)


def test_without_a_seal_every_shard_that_the_index_names_is_looked_for(trained, tmp_path):
    newest = shutil.copytree(trained / "checkpoint-3", tmp_path / "checkpoint-3")
    (newest / SEAL).unlink()
    (newest / "model.safetensors").unlink()
    vit().save_pretrained(newest, max_shard_size="8KB")
    shards = sorted(newest.glob("model-*.safetensors"))
    assert len(shards) > 1
    check_whole(newest)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        check_whole(newest)
    (newest / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        check_whole(newest)
    vit().save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").rename(newest / "model.safetensors")
    check_whole(newest)


def test_nothing_to_resume_from_is_said(tmp_path):
    assert checkpoint_to_resume(None, tmp_path) is None and checkpoint_to_resume(False, tmp_path) is None
    assert newest_whole(tmp_path) is None
    for asked in (True, str(tmp_path / "checkpoint-7")):
        with pytest.raises(CheckpointError, match="what to do"):
            checkpoint_to_resume(asked, tmp_path)
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(CheckpointError, match="checkpoint-1"):
        newest_whole(tmp_path)


# ---- Nothing that is not finite is saved ---------------------------------------------------------------------------


def counting():
    """Return a student with a buffer that is saved, and one that is not and holds infinities, as masks do."""
    student = vit()
    student.register_buffer("counted", torch.zeros(3))
    student.register_buffer("mask", torch.full((3,), float("-inf")), persistent=False)
    return student


def breaking(trainer, kind, step):
    """Return the trainer, whose student is broken behind the loss of a step."""
    training_step, student = trainer.training_step, trainer.student

    def breaks(*args, **kwargs):
        loss = training_step(*args, **kwargs)
        if trainer.state.global_step == step:
            with torch.no_grad():
                (student.counted if kind == "buffer" else student.classifier.bias).fill_(float("nan"))
        return loss

    trainer.training_step = breaks
    return trainer


@pytest.mark.parametrize("kind", ["weight", "buffer"])
def test_of_a_student_that_is_not_finite_no_checkpoint_is_written(kind, tmp_path):
    trainer = breaking(distiller(tmp_path, EACH, model=counting()), kind, 1)
    with pytest.raises(NonFiniteLossError, match="counted" if kind == "buffer" else "classifier.bias|not finite"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    check_whole(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("kind", ["weight", "buffer"])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_student_that_the_last_step_broke_is_not_saved(weight, kind, tmp_path):
    """No checkpoint and no loss comes behind it, so training ends as ever."""
    terms = {"logit_weight": weight, "feature_weight": weight}
    trainer = distiller(tmp_path, terms, model=counting())
    trainer.save_model(str(tmp_path / "saved"))
    before = (tmp_path / "saved" / "model.safetensors").read_bytes()
    breaking(trainer, kind, 2).train()
    assert trainer.state.global_step == 3
    word = "counted" if kind == "buffer" else "classifier.bias"
    with pytest.raises(NonFiniteLossError, match=f"not saved(.|\\n)*{word}"):
        trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == before
    with pytest.raises(NonFiniteLossError, match="after step 3"):
        trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_mask_of_the_students_is_saved_as_it_is(weight, tmp_path):
    student = vit()
    student.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
    trainer = distiller(tmp_path, {**EACH, "logit_weight": weight, "feature_weight": weight}, model=student)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(load_file(tmp_path / "saved" / "model.safetensors")["mask"], student.mask)
    # What breaks it is refused all the same.
    student.mask[0, 0] = float("nan")
    if weight == 0.0:
        with pytest.raises(NonFiniteLossError, match="mask"):
            trainer.save_model(str(tmp_path / "again"))


class Writes(TrainerCallback):
    """Writes into each checkpoint: a note into its configuration, other weights, a file of its own."""

    def on_save(self, args, state, control, model=None, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        model.config.note = f"step {state.global_step}"
        model.config.save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        weights["classifier.bias"] = torch.full_like(weights["classifier.bias"], state.global_step)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "notes.txt").write_text("mine")


def test_what_callbacks_write_into_a_checkpoint_belongs_to_it(tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    parts = {"eval_dataset": images(4), "callbacks": [Writes()]}
    trainer = distiller(tmp_path, {**EACH, **changes}, **parts)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    for folder in tmp_path.glob("checkpoint-*"):
        check_whole(folder)
    assert trainer.student.classifier.bias.unique().tolist() == [int(best.name.partition("-")[2])]
    (best / "notes.txt").write_text("changed")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        check_whole(best)


def test_a_feature_loss_that_is_not_finite_costs_no_student(tmp_path):
    """It is not saved with the student: a callback that saves gets one."""

    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with torch.no_grad():
                next(trainer.feature_loss.parameters()).fill_(float("nan"))
            trainer.save_model(str(tmp_path / "saved"))

    trainer = distiller(tmp_path, {"max_steps": 1}, callbacks=[Save()])
    trainer.train()
    assert (tmp_path / "saved" / "model.safetensors").is_file()
