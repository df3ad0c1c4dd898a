"""One of two processes, of which the second comes to grief; what the first one says is written down.

Usage: torchrun --nproc-per-node 2 process_worker.py FOLDER FAULT
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from makers import distiller, images
from resuming import assert_equal, checkpoint
from transformers import TrainerCallback

RANK = int(os.environ["RANK"])
SAVES = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}


class Killed(TrainerCallback):
    """Is killed in a step, as by the kernel when memory runs out."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3 and RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class Terminated(TrainerCallback):
    """Gets SIGTERM in a step, in the second process alone: the first one must learn of it."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Torn:
    """Pictures of which the second process cannot read one: each process reads every second batch."""

    def __init__(self) -> None:
        self.rows, self.reads = images(64).rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        if RANK == 1 and self.reads > 20:
            raise OSError(f"row {index} of shelf 7 is torn")
        return dict(self.rows[index])


def trainer_of(folder: Path, fault: str) -> Any:
    parts: dict[str, Any] = {"train_dataset": images(64)}
    if fault == "row":
        parts["train_dataset"] = Torn()
    if fault in ("killed", "terminated"):
        parts["callbacks"] = [Killed() if fault == "killed" else Terminated()]
    trainer = distiller(folder, SAVES, **parts)
    if fault == "nan" and RANK == 1:
        calls: list[int] = []

        def breaks(_: Any, inputs: Any, output: Any) -> Any:
            calls.append(1)
            return output * float("nan") if len(calls) == 4 else None

        trainer.student.vit.embeddings.register_forward_hook(breaks)
    if fault == "disk" and RANK == 0:
        real = torch.save

        def full(*args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step == 4:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        torch.save = full
    return trainer


def terminated(folder: Path) -> None:
    """Be terminated, go on with fresh objects, and compare with a training that nobody has touched."""
    try:
        trainer_of(folder / "twice", "terminated").train()
    except SystemExit as error:
        left = sorted(path.name for path in (folder / "twice").glob("checkpoint-*"))
        (folder / f"said{RANK}.json").write_text(json.dumps({"kind": "SystemExit", "text": f"{error.code} {left}"}))
    dist.barrier()
    trainer_of(folder / "twice", "").train(resume_from_checkpoint=True)
    trainer_of(folder / "once", "").train()
    if RANK == 0:
        assert_equal(checkpoint(folder / "once", 8), checkpoint(folder / "twice", 8))
        (folder / "equal").touch()


def main(folder: Path, fault: str) -> None:
    torch.set_num_threads(1)
    if fault == "terminated":
        terminated(folder)
        return
    # torchrun terminates the other one as soon as it sees the end of the first: it would not have time to speak.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    trainer = trainer_of(folder / "run", fault)
    try:
        trainer.train()
    except BaseException as error:
        said = {"kind": type(error).__name__, "text": str(error), "step": trainer.state.global_step}
        (folder / f"said{RANK}.json").write_text(json.dumps({**said, "at": time.time()}))
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
