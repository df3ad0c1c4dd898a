"""Ratios, targets and the table, from the numbers that were stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any

from markdown_tables import format_markdown_table

from .growth import growth_rows

# What a distillation step may cost, of a step of logit distillation, or of the student alone with a warm cache.
STEP_TARGET = {"bert": 1.05, "vit": 1.05, "resnet": 1.07}
MEMORY_TARGET = 1.05
CACHED_TARGET = 1.15
SHARE_TARGET = 0.20
# A process with one thread has its processor all the time, unless others want it too.
UNDISTURBED_SHARE = 0.95

COLUMNS = (
    "pair",
    "CE step, ms",
    "SemCKD / KD",
    "published / KD",
    "cached / CE",
    "peak memory / KD",
    "projections / student",
)


def paired_ratio(seconds: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles of the ratios of the same rounds.

    Args:
        seconds: One value a round.
        others: What they are divided by, of the same rounds.
    """
    ratios = [a / b for a, b in zip(seconds, others, strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"median": median(ratios), "low": low, "high": high}


def ratios_of(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Return the ratio of every variant to `kd`, and of `cached` to `ce`, where both were measured."""
    wanted = [(name, "kd") for name in seconds if name != "kd"] + [("cached", "ce")]
    return {
        f"{name} / {other}": paired_ratio(seconds[name], seconds[other])
        for name, other in wanted
        if name in seconds and other in seconds
    }


def targets_of(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a pair should reach and did: {"value", "target", "reached"}; without what was not measured."""
    ratios = ratios_of(record["seconds"])
    found = {
        "SemCKD / KD": (ratios.get("semckd / kd", {}).get("median"), STEP_TARGET[record["family"]]),
        "cached / CE": (ratios.get("cached / ce", {}).get("median"), CACHED_TARGET),
        "peak memory / KD": (memory_ratio(record["memory"]), MEMORY_TARGET),
        "projections / student": (projections_share(record["parameters"]), SHARE_TARGET),
    }
    return {
        name: {"value": value, "target": target, "reached": value <= target}
        for name, (value, target) in found.items()
        if value is not None
    }


def memory_ratio(memory: Mapping[str, Mapping[str, Any]], name: str = "semckd") -> float | None:
    """Return a variant's peak as a ratio to that of `kd`, or None when one of them was not measured."""
    peak, other = (memory.get(key, {}).get("peak_bytes") for key in (name, "kd"))
    return peak / other if peak and other else None


def projections_share(parameters: Mapping[str, Mapping[str, int]], name: str = "semckd") -> float | None:
    """Return the parameters of a variant's feature loss as a share of the student's."""
    return parameters[name]["feature_loss"] / parameters[name]["student"] if name in parameters else None


def table(stored: Mapping[str, Any]) -> str:
    """Return the Markdown table of a stored measurement, with what was left out, what disturbed it, and the growth."""
    pairs: Mapping[str, Any] = stored.get("pairs", {})
    blocks = []
    if pairs:
        blocks.append(format_markdown_table([_row(record) for record in pairs.values()], COLUMNS))
    notes = [
        f"- {name}: {line}" for name, record in pairs.items() for line in (*_skipped(record), *_disturbed(record))
    ]
    blocks += ["\n".join(notes)] if notes else []
    if stored.get("growth"):
        rows = growth_rows(stored["growth"])
        blocks.append("Exponents of the feature loss's own time (1: proportional to that size):")
        blocks.append(format_markdown_table(rows, list(rows[0])))
    return "\n\n".join(blocks)


def parts_table(stored: Mapping[str, Any]) -> str:
    """Return the Markdown table of a step's parts, each as a share of a KD step, one column a pair."""
    shares = {name: record["shares_of_kd"] for name, record in stored.get("pairs", {}).items()}
    parts = list(dict.fromkeys(part for entry in shares.values() for part in entry))
    if not parts:
        return ""
    rows = [
        {"part": part, **{name: f"{entry[part]:.3f}" for name, entry in shares.items() if part in entry}}
        for part in parts
    ]
    return format_markdown_table(rows, ["part", *(name for name, entry in shares.items() if entry)])


def _row(record: Mapping[str, Any]) -> dict[str, str]:
    ratios, targets = ratios_of(record["seconds"]), targets_of(record)
    ce = record["seconds"].get("ce")
    share = projections_share(record["parameters"])
    memory = memory_ratio(record["memory"])
    cells = (
        record["pair"],
        f"{1000 * median(ce):.1f}" if ce else "-",
        _spread(ratios.get("semckd / kd")) + _verdict(targets.get("SemCKD / KD")),
        _spread(ratios.get("published / kd")),
        _spread(ratios.get("cached / ce")) + _verdict(targets.get("cached / CE")),
        ("-" if memory is None else f"{memory:.3f}") + _verdict(targets.get("peak memory / KD")),
        ("-" if share is None else f"{100 * share:.1f} %")
        + _verdict(targets.get("projections / student"), percent=True),
    )
    return dict(zip(COLUMNS, cells, strict=True))


def _spread(ratio: Mapping[str, float] | None) -> str:
    return "-" if ratio is None else f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def _verdict(entry: Mapping[str, Any] | None, percent: bool = False) -> str:
    """Say what the target is and whether it was reached."""
    if entry is None:
        return ""
    target = f"{100 * entry['target']:.0f} %" if percent else f"{entry['target']:.2f}"
    return f" (≤ {target} {'reached' if entry['reached'] else 'missed'})"


def _skipped(record: Mapping[str, Any]) -> list[str]:
    """Say what was left out and why, one line a reason."""
    lines = _by_reason(record["skipped"], "not timed: {names} ({reason})")
    peaks = {name: entry["skipped"] for name, entry in record["memory"].items() if "skipped" in entry}
    return lines + _by_reason(peaks, "peak memory not measured: {names} ({reason})")


def _disturbed(record: Mapping[str, Any]) -> list[str]:
    conditions, share = record.get("conditions", {}), record.get("processor_share", 1.0)
    if conditions.get("device") != "cpu" or conditions["torch_threads"] > 1 or share >= UNDISTURBED_SHARE:
        return []
    return [f"measured on a busy machine: the process had a processor for {100 * share:.0f} % of the time"]


def _by_reason(reasons: Mapping[str, str], sentence: str) -> list[str]:
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        grouped.setdefault(reason, []).append(name)
    return [sentence.format(names=", ".join(names), reason=reason) for reason, names in grouped.items()]
