"""training/interrupts.py: on SIGTERM a training saves a checkpoint and stops, and nothing else changes."""

import os
import signal

import pytest
import torch
from makers import distiller, plain_arguments, vit
from transformers import Trainer, TrainerCallback

from hf_semckd.training.arriving import StopRequest
from hf_semckd.training.interrupts import saved_when_terminated
from hf_semckd.training.sealing import check_whole

SAVES = {"max_steps": 6, "save_strategy": "steps", "save_steps": 100}


class Terminate(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def received():
    """Return the signals that a handler of the user's gets."""
    found = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: found.append(number))
    yield found
    signal.signal(signal.SIGTERM, before)


def test_a_terminated_training_ends_after_a_checkpoint_of_its_step(tmp_path, caplog):
    trainer = distiller(tmp_path, SAVES, callbacks=[Terminate()])
    callbacks = list(trainer.callback_handler.callbacks)
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 143
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    check_whole(tmp_path / "checkpoint-2")
    assert "after step 2 of 6" in caplog.text and "resume_from_checkpoint=True" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert {type(entry) for entry in trainer.callback_handler.callbacks} == {type(entry) for entry in callbacks}


def test_any_trainer_can_be_saved_so(tmp_path):
    trainer = Trainer(vit(), plain_arguments(tmp_path, **SAVES), train_dataset=distiller(tmp_path).train_dataset)
    trainer.add_callback(Terminate())
    with pytest.raises(SystemExit), saved_when_terminated(trainer):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()


@pytest.mark.parametrize("args", [SAVES, {**SAVES, "save_strategy": "no"}])
def test_a_handler_of_the_user_is_left_alone(args, received, tmp_path):
    trainer = distiller(tmp_path, args, callbacks=[Terminate()])
    trainer.train()
    assert received == [signal.SIGTERM] and trainer.state.global_step == 6


def test_a_training_that_saves_nothing_is_terminated_as_ever(tmp_path):
    trainer = distiller(tmp_path, {"save_strategy": "no"})
    with saved_when_terminated(trainer):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_several_processes_agree_on_the_step():
    stop = StopRequest()
    stop.share(torch.tensor(0.0))
    assert not stop.agreed
    stop.share(torch.tensor(1.0))
    stop.share(torch.tensor(0.0))
    assert stop.agreed
    stop.start()
    assert not stop.agreed


def test_on_an_accelerator_the_answer_is_read_one_step_late():
    stop = StopRequest()
    # Of the accelerators the meta device alone is always there; nothing can be read from it.
    stop.share(torch.tensor(1.0, device="meta"))
    assert not stop.agreed
