"""A training that is killed, at any moment, goes on by itself as if nothing had been."""

import json
import signal
from pathlib import Path

import pytest
from fault_counts import RESUMED
from launching import python

pytestmark = pytest.mark.faults
WORKER = Path(__file__).with_name("kill_worker.py")
EACH = 20


@pytest.mark.parametrize(("seed", "kind"), enumerate(["training", "saving"]))
def test_a_training_killed_at_any_moment_resumes_by_itself(seed, kind, faults, tmp_path):
    done = python(WORKER, tmp_path, kind, seed, EACH)
    assert done.returncode == 0, done.stderr[-3000:]
    failures, found = [], json.loads((tmp_path / "killed.json").read_text())
    for entry in found:
        try:
            with faults.survived(f"killed while {kind}", RESUMED):
                assert entry["ended"] == -signal.SIGKILL and not entry["said"], entry
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, failures[0]
    assert len(found) == EACH and len({entry["moment"] for entry in found}) > EACH // 2
    # Most had more than the first checkpoint, some half a one.
    assert any(entry["left"][-1] != "checkpoint-2" for entry in found)
