"""One of two processes that `test_caching.py` starts: fills a cache together with the other one, and trains from it.

Usage: torchrun --nproc_per_node 2 caching_worker.py FOLDER
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_worker import WORLD, write
from tiny import fit, make, outcome
from torch import Tensor, nn

SAMPLES = 20
CUT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_timeout": 60}


def count_rows(model: nn.Module) -> list[int]:
    """Return a list of the number of samples that a model is given, call by call."""
    rows: list[int] = []

    def note(_: Any, args: Any, keywords: dict[str, Any]) -> None:
        rows.append(len(next(value for value in (*args, *keywords.values()) if isinstance(value, Tensor))))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return rows


def filled(folder: Path, problem: str) -> dict[str, Any]:
    """Fill ahead of the training."""
    trainer = make(problem, folder, samples=SAMPLES, teacher_cache_dir=str(folder / "cache"), **CUT)
    assert trainer.accelerator.num_processes == WORLD
    rows = count_rows(trainer.teacher)
    held = trainer.fill_teacher_cache()
    filling = sum(rows)
    rows.clear()
    again = trainer.fill_teacher_cache()
    fit(trainer)
    return {"held": held, "again": again, "filling": filling, "training": sum(rows), "done": outcome(trainer)}


def trained(folder: Path, problem: str) -> dict[str, Any]:
    """Train twice, without filling first: the second time, each process reads what either has written."""
    fit(make(problem, folder, samples=SAMPLES, teacher_cache_dir=str(folder / "cache"), **CUT))
    dist.barrier()
    trainer = make(problem, folder, samples=SAMPLES, teacher_cache_dir=str(folder / "cache"), **CUT)
    rows = count_rows(trainer.teacher)
    fit(trainer)
    return {"training": sum(rows), "done": outcome(trainer)}


JOBS = {f"{problem}-{do.__name__}": (do, problem) for problem in ("vit", "sentences") for do in (filled, trained)}


def main(folder: Path) -> None:
    """Run all jobs; one that fails says so in a file and leaves the others alone."""
    torch.set_num_threads(1)
    for name, (do, problem) in JOBS.items():
        own = folder / name
        own.mkdir(exist_ok=True)
        try:
            told = do(own, problem)
            done = told.pop("done")
            if dist.get_rank() == 0:
                write(done, folder, name)
            (folder / f"{name}.told{dist.get_rank()}.json").write_text(json.dumps(told))
        except Exception:
            rank = dist.get_rank() if dist.is_initialized() else "unknown"
            (folder / f"{name}.rank{rank}.txt").write_text(traceback.format_exc())
    print(f"world size {dist.get_world_size()}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
