"""The pictures of the studies: a map of what forced pairs of layers do, and accuracy along a swept value."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import GRID, INK, bare, new_figure

from hf_semckd.errors import InputError

from .studies import Curve, NegativeMap

# Red below zero and blue above, which any color vision tells apart.
DIVERGING = "RdBu"
# Okabe and Ito's colors, for the same reason; further methods take what is left, in their order.
COLORS = {
    "student": "#999999",
    "kd": "#E69F00",
    "semckd": "#0072B2",
    "rkd": "#009E73",
    "fitnet": "#CC79A7",
    "semckd-uniform": "#56B4E9",
}
OTHER_COLORS = ("#D55E00", "#000000", "#F0E442")
MARKERS = "osD^vP*X"
CELL = 0.72
# A map of differences this small, in points, is pale: it is nothing but noise.
LEAST_LIMIT = 0.5
# Values that span more than this factor get a logarithmic axis.
LINEAR_SPAN = 10


def plot_negative_map(found: NegativeMap, *, title: str | None = None) -> tuple[Figure, Axes]:
    """Draw what each forced pair of layers adds to the baseline as a heat map, in points, white at zero.

    Args:
        found: Maps of (student_layer, teacher_layer); cells without a seed stay gray.
        title: Text above the map; None: no title.

    Returns:
        The figure and the axes of the map; the figure belongs to no `pyplot` window and is never shown.
    """
    points = np.ma.masked_invalid(100 * found.mean)
    students, teachers = points.shape
    largest = float(np.abs(points).max()) if points.count() else 0.0
    limit = max(largest, LEAST_LIMIT)
    figure, axes = new_figure(CELL * teachers + 2.1, CELL * students + 1.3)
    axes.set_facecolor(GRID)
    mesh = axes.pcolormesh(
        np.arange(teachers + 1) + 0.5,
        np.arange(students + 1) + 0.5,
        points,
        cmap=DIVERGING,
        vmin=-limit,
        vmax=limit,
        edgecolors="white",
        linewidth=1.2,
    )
    for (student, teacher), count in np.ndenumerate(found.n):
        value = 100 * found.mean[student, teacher] if count else math.nan
        # The ends of the color map are dark.
        color = "white" if abs(value) > 0.65 * limit else "black"
        text = f"{value:+.2f}" if count else "–"
        axes.text(teacher + 1, student + 1, text, ha="center", va="center", fontsize=9, color=color)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.set_xticks(range(1, teachers + 1))
    axes.set_yticks(range(1, students + 1))
    axes.spines[:].set_visible(False)
    _label(axes, "teacher layer", "student layer", title)
    axes.tick_params(length=0)
    bar = figure.colorbar(mesh, ax=axes, shrink=0.9)
    bar.set_label(f"accuracy − {found.baseline},\nin points", fontsize=10, color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, labelsize=8, length=2)
    return figure, axes


def plot_curves(found: Sequence[Curve], *, label: str = "value", title: str | None = None) -> tuple[Figure, Axes]:
    """Draw mean accuracies along a swept value, one line a method, the bars one standard error to either side.

    The axis is logarithmic where the values are positive and span more than a factor of 10.

    Args:
        found: At least one curve; values (V,), means and errors in shares.
        label: What is swept.
        title: Text above the plot; None: no title.

    Returns:
        The figure and its axes; the figure belongs to no `pyplot` window and is never shown.

    Raises:
        InputError: When there is no curve; it is a ValueError.
    """
    if not found:
        raise InputError("There is nothing to draw", received="no curve", expected="at least one", todo="pass curves")
    figure, axes = new_figure(6.4, 4.2)
    others = [curve.method for curve in found if curve.method not in COLORS]
    for index, curve in enumerate(found):
        color = COLORS.get(curve.method)
        if color is None:
            color = OTHER_COLORS[others.index(curve.method) % len(OTHER_COLORS)]
        axes.errorbar(
            curve.values,
            100 * curve.mean,
            # Of one seed nothing is known but the value.
            yerr=100 * np.nan_to_num(curve.error),
            color=color,
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=1.6,
            capsize=3,
            label=curve.method,
        )
    values = np.unique(np.concatenate([curve.values for curve in found]))
    if is_wide(values):
        axes.set_xscale("log")
    axes.set_xticks(values, labels=[f"{value:g}" for value in values])
    axes.minorticks_off()
    bare(axes, grid="both")
    _label(axes, label, "test accuracy, in %", title)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure, axes


def is_wide(values: np.ndarray) -> bool:
    """Whether values (V,) are positive and span more than a factor of 10."""
    return bool(values.min() > 0 and values.max() > LINEAR_SPAN * values.min())


def _label(axes: Axes, horizontal: str, vertical: str, title: str | None) -> None:
    axes.set_xlabel(horizontal, fontsize=10, color=INK)
    axes.set_ylabel(vertical, fontsize=10, color=INK)
    axes.tick_params(colors=INK, labelsize=9)
    if title:
        # Two dollar signs would switch to mathematical typesetting.
        axes.set_title(title.replace("$", r"\$"), fontsize=11, color=INK, wrap=True)
