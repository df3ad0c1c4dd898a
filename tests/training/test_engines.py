"""Which engine wrote a checkpoint, and which checkpoints another one can go on from."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from makers import config

from hf_semckd.errors import CheckpointError, ConfigurationError
from hf_semckd.training.engines import Engine, check_engine, check_parallelism

DDP, FSDP = "one process or DDP", "FSDP"
FILES = {
    "alone": ["rng_state.pth", "optimizer.pt"],
    "ddp": ["rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"],
    "fsdp": ["rng_state_0.pth", "rng_state_1.pth", "pytorch_model_fsdp.bin", "optimizer.bin"],
    "fsdp_parts": ["rng_state_0.pth", "rng_state_1.pth", "pytorch_model_fsdp_0/part", "optimizer_0/part"],
    "zero2": ["rng_state_0.pth", "rng_state_1.pth", "latest", "global_step3/mp_rank_00_model_states.pt"],
    "zero3": [
        "rng_state_0.pth",
        "rng_state_1.pth",
        "latest",
        "global_step3/zero_pp_rank_0_mp_rank_00_model_states.pt",
    ],
}
WRITTEN = {
    "alone": Engine(DDP, 1),
    "ddp": Engine(DDP, 2),
    "fsdp": Engine(FSDP, 2),
    "fsdp_parts": Engine(FSDP, 2),
    "zero2": Engine("DeepSpeed", 2),
    "zero3": Engine("DeepSpeed", 2, 3),
}
RUNNING = {**WRITTEN, "zero1": Engine("DeepSpeed", 2, 1), "zero2": Engine("DeepSpeed", 2, 2)}
# Which trainings go on from which checkpoints, with another number of processes at most.
RESUMES = {
    "alone": {"alone", "ddp"},
    "ddp": {"alone", "ddp"},
    "fsdp": {"fsdp", "fsdp_parts"},
    "fsdp_parts": {"fsdp", "fsdp_parts"},
    "zero1": {"zero2"},
    "zero2": {"zero2"},
    "zero3": {"zero3"},
}


def checkpoint(folder: Path, kind: str) -> Path:
    found = folder / "checkpoint-3"
    for name in FILES[kind]:
        (found / name).parent.mkdir(parents=True, exist_ok=True)
        (found / name).touch()
    return found


@pytest.mark.parametrize("kind", FILES)
def test_the_files_of_a_checkpoint_tell_its_engine(kind, tmp_path):
    assert Engine.of_checkpoint(checkpoint(tmp_path, kind)) == WRITTEN[kind]


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("running", RUNNING)
def test_an_engine_resumes_what_it_can_read_and_refuses_the_rest_in_words(running, kind, tmp_path):
    folder = str(checkpoint(tmp_path, kind))
    if kind in RESUMES[running]:
        check_engine(folder, RUNNING[running])
        return
    with pytest.raises(CheckpointError, match="(?s)another engine.*checkpoint-3 of .*runs on.*student"):
        check_engine(folder, RUNNING[running])


def test_deepspeed_with_another_number_of_processes_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="(?s)2 processes.*1 process.*number of processes"):
        check_engine(str(checkpoint(tmp_path, "zero2")), Engine("DeepSpeed", 1, 2))


def test_a_training_without_a_checkpoint_has_nothing_to_check():
    check_engine(None, Engine(FSDP, 2))


def accelerator(**deepspeed):
    plugin = SimpleNamespace(deepspeed_config=deepspeed) if deepspeed else None
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))


def test_a_scheduler_of_deepspeed_may_not_overrule_the_rate_of_the_projections(tmp_path):
    scheduled = accelerator(scheduler={"type": "WarmupLR"})
    with pytest.raises(ConfigurationError, match="(?s)one learning rate.*projection_learning_rate=0.02"):
        check_parallelism(scheduled, config(tmp_path, learning_rate=0.02, projection_learning_rate=0.1))
    check_parallelism(scheduled, config(tmp_path, learning_rate=0.02, projection_learning_rate=0.02))
    check_parallelism(accelerator(optimizer={}), config(tmp_path, learning_rate=0.02, projection_learning_rate=0.1))
