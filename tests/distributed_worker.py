"""One of two processes that `test_distributed.py` starts: runs all jobs in turn and writes what came out.

Usage: torchrun --nproc_per_node 2 distributed_worker.py FOLDER
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launching import WORLD
from makers import Stream, distiller, images
from safetensors.torch import load_file, save_file
from tiny import PROBLEMS, Outcome, fit, make, outcome, pictures, sentences

# What one process does in a step: samples of a micro-batch, micro-batches.
WHOLE, ACCUMULATED = (4, 1), (2, 2)
EQUAL = [name for name in PROBLEMS if name not in ("resnet", "unlabeled_words")]
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
PUBLISHED = {"association": "learned", "target_norm": "none", "projector": "pairwise", "feature_weight": 50.0}


def trained(folder: Path, problem: str, **changes: Any) -> Outcome:
    """Train a problem, and check that all processes end with the same numbers."""
    trainer = make(problem, folder, **changes)
    assert trainer.accelerator.num_processes == WORLD
    assert (trainer.distillation.plan.language is not None) == ("logit_chunk_size" in changes)
    fit(trainer)
    done = outcome(trainer)
    _assert_equal_on_all_processes(done)
    return done


def resumed(folder: Path, problem: str, **changes: Any) -> Outcome:
    """Train, and go on from the middle with fresh objects."""
    fit(make(problem, folder, save_strategy="steps", save_steps=1, **changes))
    trainer = make(problem, folder, **changes)
    fit(trainer, resume_from_checkpoint=str(folder / "checkpoint-1"))
    done = outcome(trainer)
    _assert_equal_on_all_processes(done)
    return done


def taken_again(folder: Path, problem: str, **changes: Any) -> Outcome:
    """Train with the teacher that another trainer has placed."""
    teacher = make(problem, folder, **changes).teacher
    return trained(folder, problem, teacher_model=teacher, **changes)


def evaluated(folder: Path) -> Outcome:
    """Train twice, with an evaluation before and between, which prepares the student as well."""
    cut = {"max_steps": 3, "per_device_train_batch_size": 2}
    trainer = distiller(folder, cut, eval_dataset=images(4))
    for _ in range(2):
        trainer.evaluate()
        fit(trainer)
    done = outcome(trainer)
    _assert_equal_on_all_processes(done)
    return done


def job(do: Callable[..., Outcome], problem: str, micro: int, parts: int, **changes: Any) -> Callable[[Path], Outcome]:
    """Return a job that takes a folder."""
    cut = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": parts}
    return partial(do, problem=problem, **cut, **changes)


# 24 samples make three whole steps; 20 leave a last one of half the samples, in half the micro-batches.
JOBS: dict[str, Callable[[Path], Outcome]] = {
    **{f"{name}-whole": job(trained, name, *WHOLE, samples=24) for name in EQUAL},
    **{f"{name}-accumulated": job(trained, name, *ACCUMULATED, samples=20) for name in EQUAL},
    **{
        f"{name}-{terms}": job(trained, name, *ACCUMULATED, samples=20, terms=terms)
        for name in ("vit", "sentences", "tokens", "next_word")
        for terms in ("task", "logit", "feature")
    },
    **{
        f"{name}-{association}": job(trained, name, *ACCUMULATED, samples=20, association=association)
        for name in ("vit", "resnet_vit", "sentences")
        for association in ("similarity", "learned", "last", "one_to_one")
    },
    # Relations are those of a micro-batch; without them one process with larger batches must give the same.
    "vit-whole-alone": job(trained, "vit", *WHOLE, samples=24, relation_weight=0.0),
    "vit-accumulated-alone": job(trained, "vit", *ACCUMULATED, samples=20, relation_weight=0.0),
    "vit-unused": job(trained, "vit", *ACCUMULATED, samples=20, ddp_find_unused_parameters=True),
    "vit-checkpointed": job(trained, "vit", *ACCUMULATED, samples=20, **CHECKPOINTING),
    "vit-checkpointed-last": job(trained, "vit", *ACCUMULATED, samples=20, association="last", **CHECKPOINTING),
    # The head is in no term then, which DDP has to be told.
    "vit-checkpointed-feature": job(
        trained, "vit", *ACCUMULATED, samples=20, terms="feature", ddp_find_unused_parameters=True, **CHECKPOINTING
    ),
    # Without all logits; with a feature loss, and with nothing else inside the student's forward.
    "next_word-chunks": job(trained, "next_word", *ACCUMULATED, samples=20, logit_chunk_size=3),
    "next_word-chunks-logit": job(trained, "next_word", *ACCUMULATED, samples=20, terms="logit", logit_chunk_size=3),
    "unlabeled_words-chunks": job(
        trained, "unlabeled_words", *ACCUMULATED, samples=20, terms="logit", logit_chunk_size=3
    ),
    "vit-published": job(trained, "vit", 8, 1, samples=32, **PUBLISHED),
    "resnet-cnns": job(trained, "resnet", *WHOLE, samples=24, association=None),
    "vit-streamed": job(trained, "vit", *ACCUMULATED, samples=24, train_dataset=Stream(pictures(24)), max_steps=3),
    # Of several lengths: one process could not read them for both.
    "sentences-streamed": job(
        trained,
        "sentences",
        *ACCUMULATED,
        samples=24,
        train_dataset=Stream(sentences(24, "class")),
        max_steps=3,
        accelerator_config={"dispatch_batches": False},
    ),
    "vit-streamed_resumed": job(
        resumed, "vit", *ACCUMULATED, samples=24, train_dataset=Stream(pictures(24)), max_steps=3
    ),
    "vit-resumed": job(resumed, "vit", *ACCUMULATED, samples=20),
    "vit-evaluated": evaluated,
    **{
        f"vit-{placement}": job(taken_again, "vit", *ACCUMULATED, samples=20, teacher_placement=placement)
        for placement in ("offload", "shard")
    },
}


def write(done: Outcome, folder: Path) -> None:
    """Write an outcome into the folder of its job, from the first process."""
    if dist.get_rank() == 0:
        state = {key: value.contiguous() for key, value in done.state.items()}
        save_file(state, folder / "outcome.safetensors")
        (folder / "outcome.json").write_text(json.dumps({"terms": done.terms, "world": dist.get_world_size()}))


def read(folder: Path, name: str) -> tuple[Outcome, int]:
    """Return the outcome of a job, and the number of processes behind it.

    Raises:
        AssertionError: With the processes' own words, when this job failed, or one before it, which ended them all.
    """
    if not (folder / name / "outcome.json").is_file():
        failures = [path.read_text() for path in sorted(folder.glob("*/failure.*.txt"))]
        raise AssertionError("\n".join([f"{name} has no outcome", *failures]))
    written = json.loads((folder / name / "outcome.json").read_text())
    return Outcome(load_file(folder / name / "outcome.safetensors"), written["terms"]), written["world"]


def _assert_equal_on_all_processes(done: Outcome) -> None:
    """Fail on all processes or on none: one alone would leave the others waiting."""
    names = [name for name in done.state if "running_" not in name]
    gaps = []
    for name in names:
        first = done.state[name].clone()
        dist.broadcast(first, 0)
        gaps.append((first - done.state[name]).abs().max().double())
    worst = torch.stack(gaps)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    assert not [name for name, gap in zip(names, worst.tolist(), strict=True) if gap != 0]


def run_jobs(jobs: Mapping[str, Callable[[Path], object]], folder: Path) -> None:
    """Run jobs one after the other in one of the processes that torchrun started, each in a folder of its own.

    A job that fails writes why, and ends this process; torchrun then ends the other one, which may wait for it.
    """
    torch.set_num_threads(1)
    for name, job in jobs.items():
        (folder / name).mkdir(exist_ok=True)
        try:
            job(folder / name)
        except Exception:
            rank = dist.get_rank() if dist.is_initialized() else "unknown"
            (folder / name / f"failure.{rank}.txt").write_text(f"{name}: {traceback.format_exc()}")
            raise
    print(f"world size {dist.get_world_size()}", flush=True)
    dist.destroy_process_group()


def written(do: Callable[[Path], Outcome]) -> Callable[[Path], None]:
    """Return a job that also writes its outcome."""
    return lambda folder: write(do(folder), folder)


if __name__ == "__main__":
    run_jobs({name: written(do) for name, do in JOBS.items()}, Path(sys.argv[1]))
