"""What the pictures of the scripts share: a figure that belongs to no window, its inks, and how it is saved."""

from __future__ import annotations

import io
import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_semckd.files import write_atomic

INK, GRID = "#24292f", "#d0d7de"
DOTS_PER_INCH = 150


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a white figure of so many inches, and its axes; it is never shown."""
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot(facecolor="white")


def bare(axes: Axes, *, grid: str) -> None:
    """Leave the lower and the left edge alone, with a grid behind what is drawn.

    Args:
        axes: To change.
        grid: `x`, `y` or `both`.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def save_picture(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Save a figure as a .png, so that no reader ever finds half a picture.

    Raises:
        OSError: When the file cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, facecolor="white", metadata={"Software": None})
    return write_atomic(path, buffer.getvalue())
