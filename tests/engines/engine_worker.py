"""One of two processes that train on an engine, and write what came out; `test_engines.py` compares it with DDP.

Usage: accelerate launch --config_file FILE engine_worker.py FOLDER CHANGES

CHANGES are the problem and arguments of the training, as JSON; with torchrun they name the engine.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from launching import WORLD
from makers import Samples
from safetensors.torch import save_file
from tiny import PROBLEMS, OrderedTrainer, cast, fit, make
from tiny import arguments as training_arguments
from torch import Tensor, nn

STEPS, MIDDLE = 5, 3
ARGUMENTS: dict[str, Any] = {
    "optim": "adamw_torch",
    # A gradient that is 0 but for rounding would be a whole step otherwise.
    "adam_epsilon": 1e-3,
    "max_grad_norm": 0.5,
    "learning_rate": 0.02,
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
}
# The highest loss, that the last step is not the best.
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}


def put_fsdp_on_cpus() -> None:
    """Let accelerate shard models with FSDP2 on CPUs, which it does on GPUs alone; torch itself can."""
    initialize = PartialState.__init__

    def patched(self: PartialState, *args: Any, **keywords: Any) -> None:
        initialize(self, *args, **keywords)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = patched


def whole(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state, gathered from all processes."""
    parts = [entry for entry in module.parameters() if hasattr(entry, "ds_id")]
    context: Any = nullcontext()
    if parts:
        import deepspeed

        context = deepspeed.zero.GatheredParameters(parts)
    with context:
        # ZeRO-3 leaves its parameters out of a state dict.
        state = dict(module.state_dict()) | dict(module.named_parameters())
        plain = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()
        }
        return {name: value.detach().clone().contiguous() for name, value in plain.items()}


def write(trainer: Any, folder: Path, name: str) -> None:
    """Write the loadable student, the feature loss and the log of a training, from the first process."""
    trainer.save_model(str(folder / name))
    loss = {} if trainer.feature_loss is None else whole(trainer.feature_loss)
    predicted = torch.as_tensor(trainer.predict(trainer.eval_dataset).predictions)
    if trainer.is_world_process_zero():
        save_file({**loss, "predicted": predicted.contiguous()}, folder / name / "outcome.safetensors")
        names = ("loss", "task_loss", "logit_loss", "feature_loss", "grad_norm", "eval_loss")
        rows = [{key: row[key] for key in names if key in row} for row in trainer.state.log_history]
        (folder / name / "log.json").write_text(json.dumps([row for row in rows if row]))


def settings(changes: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Return the arguments of a training, and the number of its samples."""
    arguments = {**ARGUMENTS, **changes}
    step = WORLD * arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    return arguments, STEPS * step


def train(folder: Path, name: str, problem: str, changes: dict[str, Any], checkpoint: str | None = None) -> None:
    """Train a problem, or go on from a checkpoint; write what comes out."""
    arguments, samples = settings(changes)
    trainer = make(problem, folder / "run", samples=samples, dtype=torch.float32, **arguments)
    finish(trainer, folder, name, checkpoint)


def train_loaded(folder: Path, name: str, problem: str, changes: dict[str, Any], by_name: bool) -> None:
    """Train models that are loaded when the engine is known, so that transformers divides their weights."""
    whole_models = {"student": PROBLEMS[problem].student(), "teacher": PROBLEMS[problem].teacher()}
    for role, model in whole_models.items():
        if PartialState().is_main_process:
            model.save_pretrained(folder / role)
    PartialState().wait_for_everyone()
    arguments, samples = settings(changes)
    args = training_arguments(folder / "run", max_tokens=3, **arguments)
    loaded: dict[str, Any] = {role: folder / role for role in whole_models}
    if not by_name:
        loaded = {role: type(model).from_pretrained(folder / role) for role, model in whole_models.items()}
    parts = {"model": loaded["student"], "teacher_model": loaded["teacher"]}
    rows = [cast(row, torch.float32) for row in PROBLEMS[problem].rows(samples).rows]
    data = {"train_dataset": Samples(rows), "eval_dataset": Samples(rows[:8])}
    finish(OrderedTrainer(args=args, data_collator=PROBLEMS[problem].collator, **parts, **data), folder, name)


def finish(trainer: Any, folder: Path, name: str, checkpoint: str | None = None) -> None:
    """Train; the student must be the plain model afterwards."""
    fit(trainer, resume_from_checkpoint=checkpoint)
    assert not hasattr(trainer.student, "distillation_feature_loss") and not trainer.distillation.attached
    write(trainer, folder, name)


def main(folder: Path, changes: dict[str, Any]) -> None:
    """Run all jobs in turn."""
    torch.set_num_threads(1)
    problem = changes.pop("problem")
    if changes.pop("fsdp_on_cpus", False):
        put_fsdp_on_cpus()
    train(folder, "trained", problem, changes)
    train(folder, "resumed", problem, changes, str(folder / "run" / f"checkpoint-{MIDDLE}"))
    train(folder, "best", problem, {**changes, **BEST})
    train(folder, "placed", problem, {**changes, "teacher_placement": "shard"})
    train_loaded(folder, "loaded", problem, changes, by_name=False)
    train_loaded(folder, "named", problem, changes, by_name=True)
    print(f"world size {torch.distributed.get_world_size()}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
