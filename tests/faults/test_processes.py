"""What ends one of two processes ends the other soon, with the cause; SIGTERM to one lets both save the same step."""

import json
import os
import signal
from pathlib import Path

import pytest
from fault_counts import ENDED, RESUMED
from launching import torchrun
from resuming import WHOLE, assert_equal, checkpoint, fit, trainer_of
from transformers import TrainerCallback

from hf_semckd.training.sealing import newest_whole

pytestmark = pytest.mark.faults
WORKER = Path(__file__).with_name("process_worker.py")


def said(folder, rank):
    """Return what a process wrote of its end; None where it could not."""
    path = folder / f"said{rank}.json"
    return json.loads(path.read_text()) if path.is_file() else None


@pytest.mark.parametrize(
    ("fault", "failing", "kind", "words"),
    [
        ("killed", 1, None, ""),
        ("row", 1, "OSError", "shelf 7 is torn"),
        ("nan", 1, "NonFiniteLossError", "step 4"),
        ("disk", 0, "SaveError", "checkpoint-4"),
    ],
)
def test_the_end_of_one_process_ends_the_other(fault, failing, kind, words, faults, tmp_path):
    with faults.survived(f"one of two processes: {fault}", ENDED):
        done = torchrun(WORKER, tmp_path, fault)
        assert done.returncode != 0
        cause, other = said(tmp_path, failing), said(tmp_path, 1 - failing)
        assert (cause is None) if kind is None else (cause["kind"] == kind and words in cause["text"])
        # The other one was not killed: it has said by itself why it cannot go on.
        assert other["kind"] == "LostProcessError" and "see the error of the other process" in other["text"], other
        assert kind is None or words in done.stderr
        assert newest_whole(tmp_path / "run") is not None


def test_sigterm_to_one_process_saves_one_step_in_both(faults, tmp_path):
    with faults.survived("SIGTERM, two processes", RESUMED):
        done = torchrun(WORKER, tmp_path, "terminated")
        assert done.returncode == 0, done.stderr[-3000:]
        expected = {"kind": "SystemExit", "text": "143 ['checkpoint-2', 'checkpoint-4']"}
        assert said(tmp_path, 0) == said(tmp_path, 1) == expected
        assert (tmp_path / "equal").is_file()


class Terminated(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_the_step_that_it_comes_in(faults, tmp_path):
    with faults.survived("SIGTERM, one process", RESUMED):
        with pytest.raises(SystemExit):
            fit(trainer_of("vit", tmp_path / "twice", [Terminated()], save_steps=100))
        assert newest_whole(tmp_path / "twice") == str(tmp_path / "twice" / "checkpoint-3")
        fit(trainer_of("vit", tmp_path / "twice", save_steps=WHOLE), True)
        fit(trainer_of("vit", tmp_path / "once", save_steps=WHOLE))
        assert_equal(checkpoint(tmp_path / "once"), checkpoint(tmp_path / "twice"))
