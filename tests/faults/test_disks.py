"""Full disks and read-only folders cost what was to be written, and nothing that was there or is in memory."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from fault_counts import ALONE, RESUMED
from makers import assert_same_weights, distiller, images, weights
from resuming import assert_equal, checkpoint, fit, trainer_of
from transformers import TrainerCallback

from hf_semckd.errors import CheckpointError, SaveError
from hf_semckd.files import write_atomic
from hf_semckd.training.sealing import break_seal, check_whole, newest_whole

pytestmark = pytest.mark.faults
MEGABYTE = 2**20
# Nobody can write there, not even root.
FORBIDDEN = Path("/proc/hf-semckd")


class Fill(TrainerCallback):
    """Fills the disk up at a step, but for some bytes."""

    def __init__(self, disk: Path, step: int, left: int):
        self.disk, self.step, self.left = disk, step, left

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            fill(self.disk, self.left)


def fill(disk: Path, left: int = 0) -> None:
    size = shutil.disk_usage(disk).free - left
    (disk / "others").write_bytes(b"\0" * (size - size % 4096))


@pytest.mark.parametrize("left", [0, 4096, 20_000, 50_000, 80_000, 130_000, 180_000])
def test_a_full_disk_ends_the_training_after_the_last_checkpoint(left, faults, small_disk, tmp_path):
    """Wherever in the second checkpoint it becomes full."""
    disk = small_disk(2 * MEGABYTE)
    settings = {"save_steps": 2}
    trainer = trainer_of("vit", disk / "run", [Fill(disk, 3, left)], **settings)
    with faults.refused("disk full in a checkpoint", "checkpoint-4", error=SaveError):
        fit(trainer)
    assert trainer.state.global_step == 4
    check_whole(disk / "run" / "checkpoint-2")
    assert newest_whole(disk / "run") == str(disk / "run" / "checkpoint-2")
    with faults.survived("disk full in a checkpoint", RESUMED):
        (disk / "others").unlink()
        fit(trainer_of("vit", disk / "run", **settings), True)
        fit(trainer_of("vit", tmp_path / "once", **settings))
        assert_equal(checkpoint(tmp_path / "once"), checkpoint(disk / "run"))


def test_a_full_disk_in_the_final_save_leaves_the_student(faults, small_disk, tmp_path):
    disk = small_disk(MEGABYTE)
    trainer = distiller(tmp_path / "run")
    trainer.train()
    before = weights(trainer.student)
    for left in (0, 8192):
        fill(disk, left)
        with faults.refused("disk full in the final save", str(disk), error=SaveError):
            trainer.save_model(str(disk / f"student{left}"))
        (disk / "others").unlink()
    assert_same_weights(before, weights(trainer.student))
    trainer.save_model(str(disk / "student"))
    assert (disk / "student" / "model.safetensors").stat().st_size > 0


def test_a_full_disk_for_card_and_report_leaves_those_there_were(faults, small_disk):
    disk = small_disk(2 * MEGABYTE)
    trainer = distiller(disk / "run", eval_dataset=images(8))
    trainer.train()
    trainer.create_model_card()
    card = (disk / "run" / "README.md").read_bytes()
    report = trainer.distillation_report()
    fill(disk)
    with faults.refused("disk full in the card", "README.md", error=SaveError):
        trainer.create_model_card(model_name="another")
    assert (disk / "run" / "README.md").read_bytes() == card
    with faults.refused("disk full in the report", error=SaveError):
        report.save(disk / "run" / "report")


def test_a_full_disk_for_the_picture_costs_the_picture_alone(faults, small_disk, caplog):
    disk = small_disk(MEGABYTE)
    with faults.survived("disk full in the picture", ALONE):
        trainer = distiller(disk / "run", callbacks=[Fill(disk, 2, 0)])
        trainer.train()
        assert trainer.state.global_step == 3 and trainer.association() is not None
        assert "picture of the association was not saved (training is not affected)" in caplog.text


@pytest.fixture
def no_reserve(monkeypatch):
    """Let a cache use a small disk up."""
    monkeypatch.setattr("hf_semckd.teacher.cache.store.RESERVE_BYTES", 0)
    monkeypatch.setattr("hf_semckd.teacher.cache.store.RESERVE_SHARE", 0.0)


def test_a_full_disk_for_the_cache_costs_the_cache_alone(faults, small_disk, no_reserve, tmp_path, caplog):
    disk = small_disk(MEGABYTE)
    expected = distiller(tmp_path / "plain", {"max_steps": 6})
    expected.train()
    with faults.survived("disk full in the teacher cache", ALONE):
        cached = {"max_steps": 6, "teacher_cache_dir": str(disk)}
        trainer = distiller(tmp_path / "cached", cached, callbacks=[Fill(disk, 1, 0)])
        trainer.train()
        assert_same_weights(weights(expected.student), weights(trainer.student))
        assert caplog.text.count("are not stored any more, and training goes on without") == 1


@pytest.mark.parametrize("folder", [FORBIDDEN, "file"])
def test_a_folder_that_cannot_be_made_is_told_before_training(folder, faults, tmp_path):
    if folder == "file":
        folder = write_atomic(tmp_path / "file", b"") / "run"
    with faults.refused("read-only output folder", str(folder), error=SaveError):
        distiller(folder)


def test_a_read_only_folder_is_told_before_training_and_costs_no_student(faults, small_disk, tmp_path):
    disk = small_disk(MEGABYTE)
    (disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    trainer = distiller(disk / "run", {"save_strategy": "steps"})
    with faults.refused("read-only output folder", str(disk), error=SaveError):
        trainer.train()
    assert trainer.state.global_step == 0
    # Where nothing is to be saved while training, the end is where it shows; the student can be saved elsewhere.
    trainer = distiller(disk / "run")
    trainer.train()
    with faults.refused("read-only folder in the final save", str(disk), error=SaveError):
        trainer.save_model(str(disk / "run"))
    with faults.refused("read-only folder for the card", "README.md", error=SaveError):
        trainer.create_model_card()
    trainer.save_model(str(tmp_path / "student"))
    assert (tmp_path / "student" / "model.safetensors").is_file()


def test_a_read_only_cache_is_read_and_not_written(faults, small_disk, no_reserve, tmp_path, caplog):
    disk = small_disk(MEGABYTE)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with faults.survived("read-only teacher cache", ALONE):
        trainer = distiller(tmp_path / "run", {"teacher_cache_dir": str(disk)})
        trainer.train()
        assert trainer.state.global_step == 3
        assert caplog.text.count("are not stored any more, and training goes on without") == 1


def test_a_half_checkpoint_says_so(faults, tmp_path):
    """What a writer that was cut off left behind has its mark, whichever files are there."""
    fit(trainer_of("vit", tmp_path, save_steps=2))
    half = tmp_path / "checkpoint-6"
    break_seal(half)
    with faults.refused("half a checkpoint", "not all was written", error=CheckpointError):
        trainer_of("vit", tmp_path).train(resume_from_checkpoint=str(half))
    assert newest_whole(tmp_path) == str(tmp_path / "checkpoint-4")
