"""The measurement of one pair: rounds of steps, parts of a step, and each variant's peak memory."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from . import variants as kinds
from .memory import free_bytes, measure_peak_elsewhere, published_bytes
from .pairs import Pair
from .parts import measure_parts, shares_of
from .rounds import count_teacher_runs, run_rounds
from .summary import ratios_of
from .variants import Variant, make_variant

BATCHES = 4
# At least two, and at least every batch once: that is what fills the cache.
WARM_UP_ROUNDS = max(2, BATCHES)
PART_REPEATS = 5
# The estimate of the published form leaves out what is freed again within a step.
ESTIMATE_MARGIN = 1.25
GIGABYTE = 1e9
NOT_CHOSEN = "not chosen with --variants"


def measure_pair(pair: Pair, wanted: Sequence[str], device: str, rounds: int) -> dict[str, Any]:
    """Time the wanted variants of a pair; return everything but memory, ready for JSON.

    Args:
        pair: What to measure.
        wanted: Names of variants.
        device: `cpu` or `cuda`.
        rounds: Measured rounds.
    """
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in pair.make_batches(BATCHES)]
    with tempfile.TemporaryDirectory() as folder:
        teacher = pair.make_teacher().to(device)
        made, skipped, estimate = _make_variants(pair, wanted, teacher, device, Path(folder))
        everyone = list(made.values())
        run_rounds(everyone, batches, WARM_UP_ROUNDS, f"{pair.name}: warm-up")
        runs = count_teacher_runs(everyone, teacher, batches[0])
        wall, processor = time.perf_counter(), time.process_time()
        seconds = run_rounds(everyone, batches, rounds, pair.name)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        parameters = {name: variant.parameters() for name, variant in made.items()}
        del everyone
        if "published" in made:
            # No part is timed with it, and it may hold most of the memory.
            made.pop("published").close()
            gc.collect()
        parts = measure_parts(made, batches, min(PART_REPEATS, rounds), f"{pair.name}: parts")
        for variant in made.values():
            variant.close()
    return {
        "pair": pair.name,
        "family": pair.family,
        "batch_size": pair.batch_size,
        "warm_up_rounds": WARM_UP_ROUNDS,
        "seconds": seconds,
        "processor_share": processor / wall,
        "medians": {name: median(values) for name, values in seconds.items()},
        "ratios": ratios_of(seconds),
        "teacher_runs_per_step": runs,
        "parameters": parameters,
        "parts": parts,
        "shares_of_kd": shares_of(parts, median(seconds["kd"])) if "kd" in seconds else {},
        "published_bytes_estimated": estimate,
        "skipped": skipped,
    }


def measure_memory(
    name: str, record: Mapping[str, Any], wanted: Sequence[str], device: str, arguments: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the peak of each wanted variant that was timed, or why there is none.

    Args:
        name: The pair's name on the command line.
        record: What `measure_pair` returned.
        wanted: Names of variants.
        device: `cpu` or `cuda`.
        arguments: For the script that runs in the other process.
    """
    # What this process measured with must not be missing in the others.
    gc.collect()
    torch.cuda.empty_cache()
    peaks: dict[str, dict[str, Any]] = {}
    for variant in record["seconds"]:
        reason = _too_large(record["published_bytes_estimated"], device) if variant == "published" else None
        if variant not in wanted:
            peaks[variant] = {"skipped": "a quick run measures the memory of kd and semckd, for its first pair"}
        elif reason:
            peaks[variant] = {"skipped": reason}
    left = [variant for variant in record["seconds"] if variant not in peaks]
    # torch counts what each process allocates on a GPU; a CPU's memory is for one at a time.
    with ThreadPoolExecutor(len(left) or 1 if device == "cuda" else 1) as pool:
        measured = pool.map(lambda variant: measure_peak_elsewhere(name, variant, arguments), left)
        peaks |= dict(zip(left, measured, strict=True))
    return {variant: peaks[variant] for variant in record["seconds"]}


def _make_variants(
    pair: Pair, wanted: Sequence[str], teacher: nn.Module, device: str, folder: Path
) -> tuple[dict[str, Variant], dict[str, str], int | None]:
    """Return the variants, why others are missing, and the published form's estimated bytes with an optimizer."""
    student = pair.make_student()
    made: dict[str, Variant] = {}
    skipped = {name: NOT_CHOSEN for name in kinds.NAMES if name not in wanted}
    estimate = None
    for name in kinds.NAMES:
        if name not in wanted:
            continue
        if name == "published":
            known = made.get("semckd") or make_variant("semckd", pair, student, teacher, device, folder)
            reason = _too_large(published_bytes(known, pair.batch_size, optimizer=False), device)
            estimate = published_bytes(known, pair.batch_size, optimizer=True)
            if reason:
                skipped[name] = reason
                continue
        made[name] = make_variant(name, pair, student, teacher, device, folder)
    return made, skipped, estimate


def _too_large(estimate: int, device: str) -> str | None:
    """Return why something does not fit into memory, or None when it does."""
    needed, free = ESTIMATE_MARGIN * estimate, free_bytes(device)
    if needed <= free:
        return None
    return f"it needs about {needed / GIGABYTE:.1f} GB, and {free / GIGABYTE:.1f} GB are free"
