"""Kills trainings at chosen moments and resumes them, each in a fork of a process that has imported everything once.

Usage: kill_worker.py FOLDER KIND SEED COUNT. Writes what came out to FOLDER/killed.json.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from resuming import assert_equal, checkpoint, fit, trainer_of

from hf_semckd import SemCKDTrainer

# Three checkpoints, of which the first is deleted when the third is there.
SAVES = {"save_steps": 2, "save_total_limit": 2}


class Moments:
    """Counts what the interpreter calls while a training runs, and kills the process at one of these moments.

    `saves` are the first and last moment of each checkpoint.
    """

    def __init__(self, last: int | None = None):
        self.last, self.count = last, 0
        self.saves: list[tuple[int, int]] = []

    def watch(self) -> None:
        save = SemCKDTrainer._save_checkpoint

        def counted(*args: Any, **kwargs: Any) -> None:
            first = self.count
            save(*args, **kwargs)
            self.saves.append((first, self.count))

        SemCKDTrainer._save_checkpoint = counted  # type: ignore[method-assign]
        sys.setprofile(self._pass)

    def _pass(self, frame: Any, event: str, argument: Any) -> None:
        if event.endswith("call"):
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)


def forked(do: Callable[[], None], said: Path) -> int:
    """Do something in a child, which writes what it raises, and return how that ended."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            do()
            status = 0
        except BaseException:
            said.write_text(traceback.format_exc())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(folder: Path, moments: Moments, resume: bool = False) -> None:
    """Train to the end, or until the process is killed."""
    trainer = trainer_of("vit", folder, **SAVES)
    moments.watch()
    fit(trainer, resume or None)
    sys.setprofile(None)


def count(folder: Path) -> Moments:
    """Train without a fault, and return what can be counted on the way."""
    moments, note = Moments(), folder / "moments.json"

    def do() -> None:
        train(folder / "once", moments)
        note.write_text(json.dumps([moments.count, moments.saves]))

    assert forked(do, folder / "once.txt") == 0, (folder / "once.txt").read_text()
    moments.count, saves = json.loads(note.read_text())
    moments.saves = [tuple(entry) for entry in saves]
    return moments


def moments_of(whole: Moments, kind: str, draw: random.Random) -> int:
    """Draw a moment after the first checkpoint: any, or one between two writes of a later checkpoint."""
    first = whole.saves[0][1] + 1
    if kind == "training":
        return draw.randrange(first, whole.count)
    return draw.randrange(*draw.choice(whole.saves[1:]))


def main(folder: Path, kind: str, seed: int, number: int) -> None:
    torch.set_num_threads(1)
    whole, draw, found = count(folder), random.Random(seed), []
    expected = checkpoint(folder / "once")
    for index in range(number):
        place, moment = folder / f"{kind}{index}", moments_of(whole, kind, draw)
        ended = forked(lambda: train(place, Moments(moment)), folder / "killed.txt")  # noqa: B023
        left = sorted(path.name for path in place.glob("checkpoint-*"))
        said = folder / f"{kind}{index}.txt"
        again = forked(lambda: fit(trainer_of("vit", place, **SAVES), True), said)  # noqa: B023
        entry = {"moment": moment, "ended": ended, "left": left, "again": again, "said": ""}
        try:
            assert again == 0, said.read_text()
            assert_equal(expected, checkpoint(place))
        except AssertionError as error:
            entry["said"] = str(error) or "it is another training"
        found.append(entry)
    (folder / "killed.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
