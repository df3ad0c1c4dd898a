"""Charts as coordinates in percent, which the page draws; texts stay HTML, so that they keep their size on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .groups import LayerGroup, short_names, side_groups, teacher_groups
from .parts import AssociationHistory, AssociationMap, Curve, LayerError, Reliability

# More columns have no room for numbers.
MOST_NUMBERED = 16
# From these shares of the strongest color on, the usual ink is harder to read on it than its opposite, on a dark page
# and on a light one (relative luminance as WCAG 2 defines it).
STRONG = (0.6, 0.78)


@dataclass(frozen=True)
class Tick:
    """A mark on an axis, at a place in percent from the left or from the top."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """A line, its points as SVG has them; `kind` is its class."""

    label: str
    kind: str
    points: str


@dataclass(frozen=True)
class Dot:
    """A point of a scatter plot, with its radius in percent."""

    kind: str
    x: float
    y: float
    radius: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Lines and dots over two axes; `levels` are marked across."""

    title: str
    lines: tuple[Line, ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    levels: tuple[Tick, ...] = ()
    dots: tuple[Dot, ...] = ()
    x_label: str = "optimizer step"


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map: its number, the share of the strongest color in percent, and its full name.

    `strong` tells on how many of a dark and a light page its ink is turned.
    """

    text: str
    share: float
    strong: int
    title: str


@dataclass(frozen=True)
class HeatMap:
    """Weights of some student layers for the layers of one teacher."""

    caption: str
    heads: tuple[tuple[str, int], ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class Span:
    """A layer's error at the start and the end of training: both in percent of the largest."""

    layer: str
    first: float
    last: float
    label: str


def ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers from `low` to `high`."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_chart(
    title: str,
    curves: Sequence[tuple[str, str, Curve]],
    *,
    low: float = 0.0,
    high: float | None = None,
    levels: Sequence[tuple[float, str]] = (),
) -> Chart:
    """Draw curves, each with its label and class, from `low` (or less, if they are below) to `high`."""
    values = [value for _, _, curve in curves for value in curve.values]
    low, top = min(low, *values), max(values)
    top = top + 0.05 * (top - low) if high is None else max(high, top)
    top = top if top - low > 1e-12 else low + 1.0
    last = max(curve.steps[-1] for _, _, curve in curves)
    first = min(curve.steps[0] for _, _, curve in curves)
    width, height = max(last - first, 1), top - low

    def points(curve: Curve) -> str:
        pairs = zip(curve.steps, curve.values, strict=True)
        found = [((step - first) / width * 100, (top - value) / height * 100) for step, value in pairs]
        # A single value is a level: a line of one point would not be seen.
        found += [(100.0, found[0][1])] if len(found) == 1 else []
        return " ".join(f"{x:.2f},{y:.2f}" for x, y in found)

    steps = [step for step in ticks(first, first + width) if step == int(step)]
    return Chart(
        title,
        tuple(Line(label, kind, points(curve)) for label, kind, curve in curves),
        tuple(Tick((step - first) / width * 100, f"{step:,.0f}") for step in steps),
        tuple(Tick((top - value) / height * 100, f"{value:.4g}") for value in ticks(low, top)),
        tuple(Tick((top - value) / height * 100, label) for value, label in levels),
    )


def reliability_chart(reliability: Sequence[Reliability]) -> Chart:
    """Draw accuracy over confidence, a dot for each bin, its area the number of decisions."""
    dots, lines = [], []
    for kind, entry in zip(("teacher", "student"), reliability, strict=False):
        largest = max((own.count for own in entry.bins), default=1)
        for own in entry.bins:
            label = f"{entry.model}: {own.count:,} decisions, confidence {own.confidence:.0%}, {own.right:.0%} right"
            radius = 1.2 + 2.6 * math.sqrt(own.count / max(largest, 1))
            dots.append(Dot(kind, 100 * own.confidence, 100 - 100 * own.right, radius, label))
        points = " ".join(f"{100 * own.confidence:.2f},{100 - 100 * own.right:.2f}" for own in entry.bins)
        lines.append(Line(f"{entry.model}, calibration error {entry.error:.3f}", kind, points))
    marks = (0, 25, 50, 75, 100)
    x, y = tuple(Tick(n, f"{n}%") for n in marks), tuple(Tick(100 - n, f"{n}%") for n in marks)
    return Chart("Share of decisions that are right", tuple(lines), x, y, dots=tuple(dots), x_label="confidence")


def heat_maps(association: AssociationHistory) -> list[HeatMap]:
    """Return a map for every quarter of the training, each side of the student and each teacher; one color scale."""
    top = max(weight for entry in association.maps for row in entry.weights for weight in row)
    top = min(max(top, 2 / len(association.teacher_layers)), 1.0)
    students = side_groups(association.student_layers)
    teachers = teacher_groups(association.teacher_layers)
    return [
        _heat_map(association, entry, own, other, top)
        for own in students
        for other in teachers
        for entry in association.maps
    ]


def _heat_map(
    association: AssociationHistory, entry: AssociationMap, own: LayerGroup, other: LayerGroup, top: float
) -> HeatMap:
    steps = f"Step {entry.last:,}" if entry.first == entry.last else f"Steps {entry.first:,} to {entry.last:,}"
    titles = [part for part in (f"student's {own.title}" if own.title else "", other.title) if part]
    theirs = [association.teacher_layers[t] for t in other.places]
    sides = side_groups(theirs)
    order = [other.places[place] for side in sides for place in side.places]
    short = [name for side in sides for name in short_names([theirs[place] for place in side.places])]

    def cell(s: int, t: int) -> Cell:
        weight = min(max(entry.weights[s][t], 0.0), 1.0)
        share = min(weight / top, 1.0)
        text = f"{100 * weight:.0f}" if len(order) <= MOST_NUMBERED else ""
        names = f"student {association.student_layers[s]}, teacher {association.teacher_layers[t]}"
        return Cell(text, round(100 * share, 1), sum(share > level for level in STRONG), f"{names}: {weight:.1%}")

    rows = zip(short_names([association.student_layers[s] for s in own.places]), own.places, strict=True)
    return HeatMap(
        ": ".join([", ".join(titles), steps] if titles else [steps]),
        tuple((side.title, len(side.places)) for side in sides),
        tuple(short),
        tuple((name, tuple(cell(s, t) for t in order)) for name, s in rows),
    )


def error_spans(errors: Sequence[LayerError]) -> list[Span]:
    """Return the errors of layers beside each other, in percent of the largest."""
    top = max((max(entry.first, entry.last) for entry in errors), default=0.0) or 1.0
    names = short_names([entry.layer for entry in errors])
    return [
        Span(name, 100 * entry.first / top, 100 * entry.last / top, f"{entry.first:.3g} → {entry.last:.3g}")
        for name, entry in zip(names, errors, strict=True)
    ]
