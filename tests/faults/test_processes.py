"""What ends one of two processes ends the other soon, with the cause; SIGTERM to one lets both save the same step."""

import json
from pathlib import Path

import pytest
from fault_counts import ENDED, RESUMED
from launching import torchrun

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
