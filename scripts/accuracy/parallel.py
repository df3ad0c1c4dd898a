"""Several runs of a protocol at once, each in a process of its own; their rows are then simply there."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from transformers.utils import logging

from .protocol import read_protocols
from .record import Run
from .runs import Bench

# What a bench is made from: the protocol's file, the protocol in it, the folder of the rows, the device, the outputs.
Place = tuple[str, str, Path, str, Path]


def make_bench(path: str, name: str, results: Path, device: str, outputs: Path) -> Bench:
    """Return a protocol made ready in this process, on one thread."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    protocol = next(entry for entry in read_protocols(path) if entry.name == name)
    return Bench(protocol, results, device, outputs)


def run_ahead(
    bench: Bench, place: Place, methods: Sequence[str] | None, seeds: Sequence[int] | None, jobs: int
) -> None:
    """Make the rows that `bench.run` would make one after the other: first those that tune, then those that test.

    Args:
        bench: The protocol in this process; it makes none itself, and knows all of them afterwards.
        place: What the other processes make the same one from.
        methods: See `Bench.run`.
        seeds: See `Bench.run`.
        jobs: Processes.
    """
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for split in ("tuning", "test"):
            runs = [pool.submit(_train, place, run) for run in bench.missing(methods, seeds, split)]
            try:
                for run in runs:
                    run.result()
            except BaseException:
                # Else the others would be run to the end before anybody hears of it.
                pool.shutdown(cancel_futures=True)
                raise
            bench.read_rows()


# A process makes its bench once, for all the runs that it is given.
_bench_of = functools.lru_cache(maxsize=1)(make_bench)


def _train(place: Place, run: Run) -> None:
    _bench_of(*place).train(run)
