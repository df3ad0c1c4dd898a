"""One of two processes that `test_caching.py` starts: fills a cache together with the other one, and trains from it.

Usage: torchrun --nproc_per_node 2 caching_worker.py FOLDER
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from distributed_worker import run_jobs, write
from launching import WORLD
from makers import Stream
from tiny import fit, make, outcome, pictures, sentences
from torch import Tensor, nn

SAMPLES = 20
CUT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def count_rows(model: nn.Module) -> list[int]:
    """Return a list of the number of samples that a model is given, call by call."""
    rows: list[int] = []

    def note(_: Any, args: Any, keywords: dict[str, Any]) -> None:
        rows.append(len(next(value for value in (*args, *keywords.values()) if isinstance(value, Tensor))))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return rows


def tell(folder: Path, trainer: Any, **told: Any) -> None:
    """Write an outcome, and what each process has to say."""
    write(outcome(trainer), folder)
    (folder / f"told.{dist.get_rank()}.json").write_text(json.dumps(told))


def filled(folder: Path, problem: str, **changes: Any) -> None:
    """Fill ahead of the training."""
    trainer = make(problem, folder, samples=SAMPLES, teacher_cache_dir=str(folder / "cache"), **CUT, **changes)
    assert trainer.accelerator.num_processes == WORLD
    rows = count_rows(trainer.teacher)
    held = trainer.fill_teacher_cache()
    filling = sum(rows)
    rows.clear()
    again = trainer.fill_teacher_cache()
    fit(trainer)
    tell(folder, trainer, held=held, again=again, filling=filling, training=sum(rows))


def trained(folder: Path, problem: str) -> None:
    """Train twice, without filling first: the second time, each process reads what either has written."""
    fit(make(problem, folder, samples=SAMPLES, teacher_cache_dir=str(folder / "cache"), **CUT))
    dist.barrier()
    trainer = make(problem, folder, samples=SAMPLES, teacher_cache_dir=str(folder / "cache"), **CUT)
    rows = count_rows(trainer.teacher)
    fit(trainer)
    tell(folder, trainer, training=sum(rows))


JOBS = {
    f"{problem}-{do.__name__}": partial(do, problem=problem)
    for problem in ("vit", "sentences")
    for do in (filled, trained)
}
# A stream that one process reads for both, with two workers, and one of which each process reads its share.
STREAMS = {
    "vit-dispatched": partial(
        filled, problem="vit", train_dataset=Stream(pictures(SAMPLES)), max_steps=3, dataloader_num_workers=2
    ),
    "sentences-shared": partial(
        filled,
        problem="sentences",
        train_dataset=Stream(sentences(SAMPLES, "class")),
        max_steps=3,
        accelerator_config={"dispatch_batches": False},
    ),
}

if __name__ == "__main__":
    run_jobs(JOBS | STREAMS, Path(sys.argv[1]))
