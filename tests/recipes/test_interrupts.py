"""recipes/interrupts.py: SIGTERM ends a training behind a checkpoint, and nothing else changes."""

import os
import signal

import pytest
from makers import distiller
from transformers import TrainerCallback

from hf_semckd.recipes.interrupts import saved_when_terminated
from hf_semckd.training.sealing import check_whole


class Terminate(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_terminated_training_ends_behind_a_checkpoint_of_its_step(tmp_path):
    trainer = distiller(tmp_path, {"max_steps": 6}, callbacks=[Terminate()])
    before, callbacks = signal.getsignal(signal.SIGTERM), list(trainer.callback_handler.callbacks)
    with pytest.raises(KeyboardInterrupt), saved_when_terminated(trainer):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    check_whole(tmp_path / "checkpoint-2")
    assert signal.getsignal(signal.SIGTERM) is before
    assert {type(entry) for entry in trainer.callback_handler.callbacks} == {type(entry) for entry in callbacks}


def test_an_undisturbed_training_is_what_it_was(tmp_path):
    trainer = distiller(tmp_path)
    with saved_when_terminated(trainer):
        trainer.train()
    assert trainer.state.global_step == 3 and not list(tmp_path.glob("checkpoint-*"))
