"""What README.md and docs/results say of the price of a step, computed from the stored measurements."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from .summary import ratios_of, table


def step_regions(results: Path) -> dict[str, Callable[..., str]]:
    """Return what computes each region's text, by the region's name; the arguments name a file without its ending.

    `step <file>` is the table; within a sentence, `overhead <file> ...` is the range of SemCKD's price over KD in
    percent, `milliseconds <file> <pair> <variant>` a median step, `extra <file>` the range of milliseconds that SemCKD
    adds to a KD step, `gigabytes <file> <pair> <variant>` a peak.
    """

    def stored(name: str) -> dict[str, Any]:
        found = json.loads((results / f"{name}.json").read_text("utf-8"))
        for entry in found["pairs"].values():
            # What nobody chose to time needs no note.
            entry["skipped"] = {kind: why for kind, why in entry["skipped"].items() if "--variants" not in why}
        return found

    def record(name: str, pair: str) -> Mapping[str, Any]:
        pairs = stored(name)["pairs"]
        return next(entry for key, entry in pairs.items() if key.split(",")[0] == pair)

    def overhead(*names: str) -> str:
        ratios = [
            ratios_of(entry["seconds"])["semckd / kd"]["median"]
            for name in names
            for entry in stored(name)["pairs"].values()
        ]
        return f"{100 * (min(ratios) - 1):.0f} to {100 * (max(ratios) - 1):.0f} %"

    def extra(name: str) -> str:
        times = [entry["seconds"] for entry in stored(name)["pairs"].values()]
        added = [1000 * (median(entry["semckd"]) - median(entry["kd"])) for entry in times]
        return f"{min(added):.0f} to {max(added):.0f} ms"

    return {
        "step": lambda name: table(stored(name)),
        "overhead": overhead,
        "extra": extra,
        "milliseconds": lambda name, pair, kind: f"{1000 * median(record(name, pair)['seconds'][kind]):.0f} ms",
        "gigabytes": lambda name, pair, kind: f"{record(name, pair)['memory'][kind]['peak_bytes'] / 1e9:.1f} GB",
        "price": lambda name, pair, kind: f"{ratios_of(record(name, pair)['seconds'])[f'{kind} / kd']['median']:.2f}",
    }
