"""The deploy table of a model card, from what `evaluate` found."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .redaction import is_plain_text
from .settings import version_rows

STUDENT = "student"


@dataclass(frozen=True)
class CardTable:
    """Cells of a table in Markdown, the heading first, and what was measured.

    Attributes:
        metric, quality: The student's, run by PyTorch.
        headline: How the student compares with the first row, in a sentence; empty where it is the first row.
        calibration: Expected calibration errors of student and first row; None where not known.
        footnote: Number of samples and machine.
        kept: What the share that is kept is a share of.
    """

    rows: tuple[tuple[str, ...], ...]
    metric: str
    quality: float
    headline: str
    calibration: tuple[float, float] | None
    footnote: str
    kept: str


def card_table(evaluation: Mapping[str, Any]) -> CardTable | None:
    """Return the table of an evaluation in the form of `evaluation.json`; None where names of its are no plain words.

    Raises `InputError` for another form.
    """
    try:
        rows: Sequence[Mapping[str, Any]] = evaluation["rows"]
        if not _may_be_published(evaluation):
            return None
        names = list(dict.fromkeys(row["model"] for row in rows))
        name = STUDENT if STUDENT in names else names[-1]
        student = next(row for row in rows if row["model"] == name)
        counts = [int(entry["samples"]) for entry in rows[0]["latency"]]
        metric = str(evaluation["metric"])
        head = ("model", "run by", metric, "kept (95% interval)", "parameters", "size")
        errors = student["calibration_error"], rows[0]["calibration_error"]
        return CardTable(
            rows=((*head, *(f"ms, batch of {count}" for count in counts)), *(_cells(row) for row in rows)),
            metric=metric,
            quality=_number(student["quality"]),
            headline="" if student is rows[0] else _headline(rows[0], student, evaluation),
            calibration=None if None in errors else (float(errors[0]), float(errors[1])),
            footnote=_footnote(evaluation),
            kept=f"the first row's {metric} divided by the row's own"
            if _less_is_better(evaluation)
            else f"the share of the first row's {metric}",
        )
    except (KeyError, TypeError, ValueError, IndexError, StopIteration) as error:
        raise InputError(
            "This is not an evaluation",
            received=f"{type(error).__name__}: {error}",
            expected="what hf_semckd.evaluate returns, or its evaluation.json",
            todo="evaluate again, or leave it out",
        ) from error


def _may_be_published(evaluation: Mapping[str, Any]) -> bool:
    """Whether names are plain words and notes hold no path: a model may be called by its folder."""
    names = [evaluation["metric"], *(row[part] for row in evaluation["rows"] for part in ("model", "runtime"))]
    notes = evaluation.get("notes") or ()
    return all(is_plain_text(str(name)) for name in names) and not any(set("/\\") & set(note) for note in notes)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    size = "–" if row["disk_bytes"] is None else f"{row['disk_bytes'] / 1e6:,.1f} MB"
    way = row["runtime"] if row["device"] == "cpu" else f"{row['runtime']}, GPU"
    times = [_time(_number(entry["p50"])) for entry in row["latency"]]
    return (row["model"], way, f"{_number(row['quality']):.4g}", _kept(row), f"{row['parameters']:,}", size, *times)


def _kept(row: Mapping[str, Any]) -> str:
    value, low, high = (_number(row["kept"][part]) for part in ("value", "low", "high"))
    if not math.isfinite(value):
        return "–"
    return f"{value:.1%}" if low == high else f"{value:.1%} ({low:.1%} – {high:.1%})"


def _time(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _headline(first: Mapping[str, Any], student: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    metric, kept = evaluation["metric"], _number(student["kept"]["value"])
    ratio = _number(first["latency"][0]["p50"]) / _number(student["latency"][0]["p50"])
    speed = f"runs {ratio:.2g} times as fast" if ratio >= 1 else f"takes {1 / ratio:.2g} times as long"
    who = "its teacher" if first["model"] == "teacher" else first["model"]
    batch = int(first["latency"][0]["samples"])
    if _less_is_better(evaluation):
        change = f"{abs(1 / kept - 1):.1%} {'lower' if kept >= 1 else 'higher'}"
        return f"Compared with {who}, its {metric} is {change}, and it {speed} (batch of {batch})."
    return f"Compared with {who}, it keeps {_kept(student)} of the {metric} and {speed} (batch of {batch})."


def _footnote(evaluation: Mapping[str, Any]) -> str:
    machine = evaluation["machine"]
    threads = int(machine["torch_threads"])
    where = [version_rows({"processor": machine["processor"]}).get("hardware", "a CPU")]
    where += [f"{threads} thread" + "s" * (threads > 1)]
    where += [version_rows({"accelerator": machine["accelerator"]})["hardware"]] if machine["accelerator"] else []
    less = f"; the lower its {evaluation['metric']}, the better a model" if _less_is_better(evaluation) else ""
    return (
        f"Quality on {int(evaluation['samples']):,} samples; latency is the median of a forward pass, on "
        f"{', '.join(where)}{less}."
    )


def _less_is_better(evaluation: Mapping[str, Any]) -> bool:
    return not evaluation.get("higher_is_better", True)


def _number(value: Any) -> float:
    """Return a number; what JSON cannot hold is null there."""
    return math.nan if value is None else float(value)
