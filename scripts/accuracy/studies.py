"""The studies of the SemCKD paper, computed from rows alone: negative regularization, curves, semantic mismatch.

Source:
    Wang et al., "SemCKD: Semantic Calibration for Cross-Layer Knowledge Distillation", TKDE 2023.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np
from markdown_tables import format_markdown_table

from hf_semckd.errors import InputError

from .protocol import PAIR
from .rows import TEACHER, accuracies
from .statistics import ROUNDING

Rows = Sequence[Mapping[str, Any]]

BASELINE = "kd"


@dataclass(frozen=True)
class NegativeMap:
    """What forcing one student layer onto one teacher layer adds to a baseline, paired by seed.

    Attributes:
        mean: (S, T), mean difference in shares (0.01 is a point); NaN where no seed is common.
        std: (S, T), sample standard deviation of the differences; NaN for fewer than two.
        n: (S, T), number of common seeds.
        baseline: The method that is subtracted.
    """

    mean: np.ndarray
    std: np.ndarray
    n: np.ndarray
    baseline: str = BASELINE


@dataclass(frozen=True)
class Curve:
    """The accuracy of a method over a swept value.

    Attributes:
        method: The method.
        values: (V,), the swept values, ascending.
        mean: (V,), mean accuracy over seeds in [0, 1]; NaN where there is no row.
        error: (V,), standard error of the mean; NaN for fewer than two seeds.
        n: (V,), number of seeds.
    """

    method: str
    values: np.ndarray
    mean: np.ndarray
    error: np.ndarray
    n: np.ndarray


def negative_map(rows: Rows, protocol: str, baseline: str = BASELINE) -> NegativeMap:
    """Return what every forced pair of layers, the methods `pair-<s>-<t>`, adds to a baseline.

    Args:
        rows: As `rows.read_rows` returns them.
        protocol: The protocol's name.
        baseline: The method that is subtracted, seed by seed.

    Returns:
        Maps of (S, T) with S and T the largest layers among the rows.

    Raises:
        InputError: When the protocol has no test rows of a pair, or none of the baseline; it is a ValueError.
    """
    methods = _tested(rows, [protocol])
    pairs = {name: tuple(map(int, found.groups())) for name in methods if (found := PAIR.fullmatch(name))}
    if not pairs or baseline not in methods:
        raise InputError(
            f"There is no map of {protocol} yet",
            received=f"test rows of {', '.join(methods) or 'no method'}",
            expected=f"{baseline} and pair-<s>-<t>",
            todo="run the study first",
        )
    shape = tuple(max(layers) for layers in zip(*pairs.values(), strict=True))
    means, deviations, counts = np.full(shape, math.nan), np.full(shape, math.nan), np.zeros(shape, dtype=np.int64)
    found_values = accuracies(rows, [protocol], [*pairs, baseline])[protocol]
    others = found_values[baseline]
    for name, (student, teacher) in pairs.items():
        values = found_values[name]
        differences = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
        place = student - 1, teacher - 1
        means[place], deviations[place], counts[place] = _moments(differences)
    return NegativeMap(means, deviations, counts, baseline)


def negative_table(found: NegativeMap) -> str:
    """Return the Markdown table of a map in points, mean ± standard deviation and seeds, a line a student layer."""
    students, teachers = found.mean.shape
    return _layer_table([[_points(found, (s, t)) for t in range(teachers)] for s in range(students)])


def negative_sentence(found: NegativeMap) -> str:
    """Return in words how many pairs of layers do harm."""
    known = found.mean[found.n > 0]
    worse = int((known < -ROUNDING).sum())
    return f"{worse} of {len(known)} pairs of layers give a lower mean accuracy than {found.baseline} alone."


def curves(rows: Rows, name: str, methods: Sequence[str] | None = None) -> list[Curve]:
    """Return the accuracy of each method over the values of a sweep, of the protocols `<name>@<value>`.

    Args:
        rows: As `rows.read_rows` returns them.
        name: The sweep's name.
        methods: The wanted methods, in the order of the result; None: all that have rows, without the teacher.

    Returns:
        One curve a method, all with the same values.

    Raises:
        InputError: When there are no test rows, or a value is no number; it is a ValueError.
    """
    prefix = f"{name}@"
    named = dict.fromkeys(row["protocol"] for row in rows if row["split"] == "test")
    values = {protocol: _number(protocol, prefix) for protocol in named if protocol.startswith(prefix)}
    if not values:
        raise InputError(
            f"There is no curve of {name} yet",
            received=f"rows of {', '.join(named) or 'no protocol'}",
            expected=f"rows of {prefix}<value>",
            todo="run the study first",
        )
    ordered = sorted(values, key=values.__getitem__)
    chosen = [method for method in _tested(rows, ordered) if method != TEACHER] if methods is None else methods
    found = accuracies(rows, ordered, chosen)
    return [
        _curve(method, [values[entry] for entry in ordered], [found[p][method] for p in ordered]) for method in chosen
    ]


def curve_table(found: Sequence[Curve]) -> str:
    """Return the Markdown table of curves in %, mean ± standard error, a line a method and a column a value.

    Raises:
        InputError: When there are no curves.
    """
    columns = [f"{value:g}" for value in (found[0].values if found else ())]
    lines = []
    for curve in found:
        cells = (_percent(*entry) for entry in zip(curve.mean, curve.error, strict=True))
        lines.append({"method": curve.method, **dict(zip(columns, cells, strict=True))})
    return format_markdown_table(lines, ["method", *columns])


def mismatches(rows: Rows, protocols: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Return the semantic mismatch scores of the test rows that have one, by protocol and method, ascending by seed.

    Args:
        rows: As `rows.read_rows` returns them.
        protocols: The wanted protocols, in the order of the result.
    """
    found: dict[str, dict[str, list[float]]] = {protocol: {} for protocol in protocols}
    for row in sorted(rows, key=lambda entry: entry["seed"]):
        score = row["extras"].get("mismatch")
        if row["split"] == "test" and row["protocol"] in found and score is not None:
            found[row["protocol"]].setdefault(row["method"], []).append(score)
    return found


def mismatch_table(rows: Rows, protocols: Sequence[str]) -> str:
    """Return the Markdown table of the scores, mean ± standard deviation; protocols without scores are left out.

    Raises:
        InputError: When no row has a score; it is a ValueError.
    """
    found = {protocol: scores for protocol, scores in mismatches(rows, protocols).items() if scores}
    if not found:
        raise InputError(
            "There are no semantic mismatch scores yet",
            received=f"rows of {', '.join(protocols) or 'no protocol'} without any",
            expected="test rows of a method with an association",
            todo="run the study; rows that were kept without a score have to be run anew",
        )
    methods = dict.fromkeys(method for scores in found.values() for method in scores)
    lines = [
        {"method": method, **{protocol: _score(scores.get(method, ())) for protocol, scores in found.items()}}
        for method in methods
    ]
    return format_markdown_table(lines, ["method", *found])


def _tested(rows: Rows, protocols: Iterable[str]) -> list[str]:
    """Return the methods with test rows, in the order in which they are first met."""
    wanted = set(protocols)
    return list(dict.fromkeys(row["method"] for row in rows if row["split"] == "test" and row["protocol"] in wanted))


def _moments(values: Sequence[float]) -> tuple[float, float, int]:
    return mean(values) if values else math.nan, stdev(values) if len(values) > 1 else math.nan, len(values)


def _curve(method: str, values: Sequence[float], shares: Sequence[Mapping[int, float]]) -> Curve:
    moments = [_moments(list(entry.values())) for entry in shares]
    means, deviations, counts = (np.array(column) for column in zip(*moments, strict=True))
    return Curve(method, np.array(values), means, deviations / np.sqrt(np.maximum(counts, 1)), counts)


def _number(protocol: str, prefix: str) -> float:
    try:
        return float(protocol.removeprefix(prefix))
    except ValueError as error:
        expected = f"{prefix}<number>"
        raise InputError(
            "This is no point of a curve", received=protocol, expected=expected, todo="sweep numbers"
        ) from error


def _points(found: NegativeMap, place: tuple[int, int]) -> str | None:
    if not found.n[place]:
        return None
    spread = "" if math.isnan(found.std[place]) else f" ± {100 * found.std[place]:.2f}"
    return f"{100 * found.mean[place]:+.2f}{spread} (n = {found.n[place]})"


def _percent(value: float, error: float) -> str | None:
    if math.isnan(value):
        return None
    return f"{100 * value:.2f}" + ("" if math.isnan(error) else f" ± {100 * error:.2f}")


def _score(scores: Sequence[float]) -> str | None:
    if not scores:
        return None
    return f"{mean(scores):.3f}" + (f" ± {stdev(scores):.3f}" if len(scores) > 1 else "")


def mean_association(rows: Rows, protocol: str, method: str = "semckd") -> tuple[np.ndarray, int]:
    """Return the mean association weights (S, T) of a method's test runs when training ended, and how many there are.

    Raises:
        InputError: When no such run is there, or none with an association.
    """
    weights = [
        row["extras"]["association"]
        for row in rows
        if row["protocol"] == protocol and row["method"] == method and row["split"] == "test"
        if "association" in row["extras"]
    ]
    if not weights:
        raise InputError(
            f"There is no association of {protocol} yet",
            received=f"{len(rows)} rows",
            expected=f"tests of `{method}`",
            todo="run the study without --table-only",
        )
    return np.mean(weights, axis=0), len(weights)


def association_table(weights: np.ndarray) -> str:
    """Return association weights (S, T) as a Markdown table, in per cent."""
    return _layer_table([[f"{100 * weight:.0f}" for weight in row] for row in weights])


def _layer_table(cells: Sequence[Sequence[str | None]]) -> str:
    """Return a Markdown table with a line a student layer and a column a teacher layer."""
    columns = [f"teacher {t}" for t in range(1, len(cells[0]) + 1)]
    lines = [{"layer": f"student {s}", **dict(zip(columns, row, strict=True))} for s, row in enumerate(cells, start=1)]
    return format_markdown_table(lines, ["layer", *columns])
