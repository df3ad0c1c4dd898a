"""Which engine wrote a checkpoint, and which checkpoints another one can go on from."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from makers import config

from hf_semckd.errors import CheckpointError, ConfigurationError, InputError
from hf_semckd.training.checks import check_placement
from hf_semckd.training.engines import Engine, check_engine, check_parallelism, leave_gpus_to_teacher

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
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), num_processes=1)


def test_a_scheduler_of_deepspeed_may_not_overrule_the_rate_of_the_projections(tmp_path):
    scheduled = accelerator(scheduler={"type": "WarmupLR"})
    with pytest.raises(ConfigurationError, match="(?s)one learning rate.*projection_learning_rate=0.02"):
        check_parallelism(scheduled, config(tmp_path, learning_rate=0.02, projection_learning_rate=0.1))
    check_parallelism(scheduled, config(tmp_path, learning_rate=0.02, projection_learning_rate=0.02))
    check_parallelism(accelerator(optimizer={}), config(tmp_path, learning_rate=0.02, projection_learning_rate=0.1))


def ready(folder, **changes):
    """Return arguments that have found their device and counted the GPUs."""
    args = config(folder, **changes)
    assert args.device.type == "cpu"
    return args


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {}])
def test_what_no_launcher_has_started_is_one_process(variables, tmp_path, monkeypatch):
    args = ready(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_parallelism(accelerator(), args)


def test_processes_that_would_train_alone_are_refused(tmp_path, monkeypatch):
    args = ready(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigurationError, match="(?s)do not train together.*2 processes.*use_cpu=True"):
        check_parallelism(accelerator(), args)


def test_fsdp_that_accelerate_leaves_out_is_told(tmp_path, monkeypatch, caplog):
    args = ready(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_parallelism(accelerator(), args)
    assert "FSDP was asked for and is off" in caplog.text


def test_several_gpus_in_one_process_are_for_a_teacher_that_is_divided(tmp_path):
    divided = SimpleNamespace(hf_device_map={"embeddings": 0, "encoder": 1})
    whole = SimpleNamespace(hf_device_map={"": 0})
    for teachers, placement, left in (([divided], "device", 1), (["name"], "device_map", 1), ([whole], "device", 2)):
        args = ready(tmp_path, teacher_placement=placement)
        args._n_gpu = 2
        leave_gpus_to_teacher(args, teachers)
        assert args.n_gpu == left
        if left == 2:
            with pytest.raises(InputError, match="(?s)DataParallel.*2 GPUs.*torchrun.*device_map"):
                check_parallelism(accelerator(), args)
        else:
            check_parallelism(accelerator(), args)


def test_a_teacher_on_all_devices_is_for_one_process(tmp_path):
    args = SimpleNamespace(teacher_placement="device_map", world_size=2, teacher_bits=None)
    with pytest.raises(ConfigurationError, match="(?s)One process alone.*2 processes.*'shard'"):
        check_placement(args, None)
