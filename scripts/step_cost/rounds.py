"""Rounds in which every variant takes one step with the same batch, so that a disturbance hits all of them alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from tqdm import tqdm

from .variants import Variant


def run_rounds(
    variants: Sequence[Variant], batches: Sequence[Mapping[str, Tensor]], rounds: int, description: str
) -> dict[str, list[float]]:
    """Let the variants step in turn (A B C A B C ...); return each one's seconds, in the order of the rounds.

    Args:
        variants: Who steps.
        batches: Taken in turn, one a round.
        rounds: How many.
        description: Shown with the progress, on stderr.
    """
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for index in tqdm(range(rounds), desc=description, leave=False):
        for variant in variants:
            seconds[variant.name].append(variant.step(batches[index % len(batches)]))
    return seconds


def count_teacher_runs(variants: Sequence[Variant], teacher: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, int]:
    """Count how often a step of each variant runs the teacher, which tells that a cache was warm; nothing is timed."""
    runs: list[None] = []
    handle = teacher.register_forward_hook(lambda *_: runs.append(None))
    counts = {}
    try:
        for variant in variants:
            runs.clear()
            variant.step(batch)
            counts[variant.name] = len(runs)
    finally:
        handle.remove()
    return counts
