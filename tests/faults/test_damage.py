"""Damaged checkpoints are refused by the name of the file, or passed over, and never trained on."""

import random
import shutil

import pytest
from fault_counts import RESUMED
from resuming import HALF, Stop, assert_equal, checkpoint, fit, trainer_of

from hf_semckd.errors import CheckpointError
from hf_semckd.training.sealing import SEAL

pytestmark = pytest.mark.faults
EACH = {"save_steps": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a training that stopped after three of six steps."""
    folder = tmp_path_factory.mktemp("damaged")
    fit(trainer_of("vit", folder / "run", [Stop(HALF)], **EACH))
    fit(trainer_of("vit", folder / "once", **EACH))
    return folder


def damages(path, draw):
    """Yield each kind of damage of a file, one after the other, and put the file back."""
    content = path.read_bytes()
    path.unlink()
    yield "deleted"
    path.write_bytes(b"")
    yield "emptied"
    path.write_bytes(content[: len(content) // 2])
    yield "cut in half"
    place = draw.randrange(len(content))
    path.write_bytes(content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :])
    yield "with a byte flipped"
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_never_trained_on(faults, trained, tmp_path):
    """The training itself is asked, and takes no step."""
    run = shutil.copytree(trained / "run", tmp_path / "run")
    newest, draw, tried = run / "checkpoint-3", random.Random(0), 0
    trainer = trainer_of("vit", run, **EACH)
    for path in sorted(newest.iterdir()):
        for damage in damages(path, draw):
            kind = f"checkpoint file {damage}"
            if path.name == SEAL and damage == "deleted":
                continue  # below
            with faults.refused(kind, path.name if path.name != SEAL else "checkpoint-3", error=CheckpointError):
                trainer.train(resume_from_checkpoint=str(newest))
            tried += 1
    assert tried >= 4 * 8 and trainer.state.global_step == 0


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(faults, trained, tmp_path, caplog):
    run, draw = shutil.copytree(trained / "run", tmp_path / "run"), random.Random(1)
    for damage in damages(run / "checkpoint-3" / "feature_loss.safetensors", draw):
        with faults.survived(f"checkpoint file {damage}", RESUMED):
            again = shutil.copytree(run, tmp_path / damage)
            fit(trainer_of("vit", again, **EACH), True)
            assert_equal(checkpoint(trained / "once"), checkpoint(again))
            assert "checkpoint-3 is passed over" in caplog.text


def test_a_checkpoint_without_its_seal_is_whole_and_taken(faults, trained, tmp_path):
    """Those of plain `Trainer` and of earlier versions have none."""
    run = shutil.copytree(trained / "run", tmp_path / "run")
    (run / "checkpoint-3" / SEAL).unlink()
    with faults.survived("checkpoint file deleted", RESUMED):
        fit(trainer_of("vit", run, **EACH), True)
        assert_equal(checkpoint(trained / "once"), checkpoint(run))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_damage_without_a_seal_is_refused_too(name, faults, trained, tmp_path):
    run, draw = shutil.copytree(trained / "run", tmp_path / "run"), random.Random(2)
    (run / "checkpoint-3" / SEAL).unlink()
    for damage in damages(run / "checkpoint-3" / name, draw):
        # Which files there were, and a flipped bit of safetensors, can only be known by the seal.
        if damage in ("emptied", "cut in half"):
            with faults.refused(f"checkpoint file {damage}, no seal", name, error=CheckpointError):
                trainer_of("vit", run, **EACH).train(resume_from_checkpoint=str(run / "checkpoint-3"))
