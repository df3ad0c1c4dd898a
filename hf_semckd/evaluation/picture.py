"""The deploy table as a picture: quality over latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files import replacing
from ..publishing.plots import DOTS_PER_INCH, INK, load_matplotlib
from ..publishing.rows import Row

MARKERS = ("o", "s", "D", "^")
# Okabe and Ito's colors, which differ for any color vision.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def save_picture(rows: Sequence[Row], metric: str, path: Path, *, higher_is_better: bool = True) -> Path:
    """Draw quality over the latency of the smallest batch: a color for each model, a shape for each way to run it.

    Bars are the 95 % intervals of the share of the first row's quality. Raises `MissingDependencyError` without
    matplotlib.
    """
    matplotlib = load_matplotlib()
    figure = matplotlib.figure.Figure(figsize=(6.4, 4.0), dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="white")
    models = list(dict.fromkeys(row.model for row in rows))
    ways = list(dict.fromkeys(way_of(row) for row in rows))
    for row in rows:
        ends = (row.kept.low, row.kept.high)
        bounds = [rows[0].quality * end if higher_is_better else rows[0].quality / end for end in ends]
        axes.errorbar(
            row.latency[0].p50,
            row.quality,
            yerr=[[abs(bound - row.quality)] for bound in sorted(bounds)],
            color=COLORS[models.index(row.model) % len(COLORS)],
            marker=MARKERS[ways.index(way_of(row)) % len(MARKERS)],
            markersize=7,
            capsize=3,
            linewidth=1,
        )
    for name, color in zip(models, COLORS * len(models), strict=False):
        axes.plot([], [], marker="o", linestyle="", color=color, label=name.replace("$", r"\$"))
    for way, marker in zip(ways, MARKERS * len(ways), strict=False):
        axes.plot([], [], marker=marker, linestyle="", color=INK, fillstyle="none", label=way)
    axes.set_xscale("log")
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis(matplotlib.ticker.LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.6)))
    axes.set_xlabel(f"milliseconds for a batch of {rows[0].latency[0].samples} (median)", color=INK)
    axes.set_ylabel(metric, color=INK)
    axes.tick_params(colors=INK, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH, facecolor="white")
    return path


def way_of(row: Row) -> str:
    """Return how a model was run."""
    return row.runtime if row.device == "cpu" else f"{row.runtime}, GPU"
