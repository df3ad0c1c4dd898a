"""Pictures of what was learned: the association of student layers with teacher layers."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from ..errors import InputError, MissingDependencyError
from ..files import write_atomic

# Perceptually uniform, readable with any color vision and in gray.
COLOR_MAP = "magma_r"

INK = "#24292f"

LARGEST_ANNOTATED = 12

MOST_TICKS = 24

DOTS_PER_INCH = 150

UNIFORM_MARK = "uniform level"


def plot_association(
    association: np.ndarray,
    student_layers: Sequence[str] | None = None,
    teacher_layers: Sequence[str] | None = None,
    *,
    title: str | None = None,
) -> tuple[Figure, Axes]:
    """Draw the mean association weights as a heat map, one row a student layer and one column a teacher layer.

    The values are written into the cells up to 12 x 12 layers; the color bar marks the uniform level
    1 / teacher_layer, at which a student layer has no preference. The figure belongs to no `pyplot` window, is
    never shown and looks the same whatever style the user has set; save it with `figure.savefig` or
    `save_association_plot`.

    Args:
        association: (student_layer, teacher_layer), weights in [0, 1], as from `trainer.association()`.
        student_layers: A name for each row; None: 1, 2, ...
        teacher_layers: A name for each column; None: 1, 2, ...
        title: Text above the map; None: no title.

    Returns:
        The figure and the axes of the map.

    Raises:
        InputError: When the association is not two-dimensional, is empty, holds NaN, infinities or values outside
            [0, 1], or when the names are not one a layer; it is a ValueError.
        MissingDependencyError: When matplotlib is not installed.

    Source:
        The weights are alpha of Chen et al., "Cross-Layer Distillation with Semantic Calibration", AAAI 2021.
    """
    weights = validate_association(association)
    rows = _names(student_layers, weights.shape[0], "student")
    columns = _names(teacher_layers, weights.shape[1], "teacher")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise _matplotlib_missing() from error

    cell = _cell_inches(max(weights.shape))
    height, width = weights.shape[0] * cell, weights.shape[1] * cell
    # An explicit face, here and when saving: a transparent one is unreadable on a dark page.
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), facecolor="white")
    mesh = _draw_cells(axes, weights)
    _label_axes(axes, rows, columns, title)
    if max(weights.shape) <= LARGEST_ANNOTATED:
        _annotate(axes, mesh, weights, fontsize=min(9.0, 16 * cell))
    _add_color_bar(axes, mesh, teacher_layers=weights.shape[1], map_size=(width, height))
    _fit_figure(figure, axes, canvas, map_size=(width, height))
    return figure, axes


def save_association_plot(
    association: np.ndarray,
    path: str | os.PathLike[str],
    student_layers: Sequence[str] | None = None,
    teacher_layers: Sequence[str] | None = None,
    *,
    title: str | None = None,
) -> Path:
    """Draw the association with `plot_association` and save it so that no reader ever finds half a picture.

    Args:
        association: (student_layer, teacher_layer), weights in [0, 1].
        path: File to write, its ending the format (.png, .svg, .pdf, ...); missing parent folders are made.
        student_layers: A name for each row; None: 1, 2, ...
        teacher_layers: A name for each column; None: 1, 2, ...
        title: Text above the map; None: no title.

    Returns:
        The path.

    Raises:
        InputError: What `plot_association` refuses, or an ending that is no picture format.
        MissingDependencyError: When matplotlib is not installed.
        OSError: When the file cannot be written; an old file is then left as it was.
    """
    target = Path(path)
    figure, _ = plot_association(association, student_layers, teacher_layers, title=title)
    formats = figure.canvas.get_supported_filetypes()
    picture_format = target.suffix[1:].lower()
    if picture_format not in formats:
        raise InputError(
            "The ending of the path is no picture format",
            received=repr(target.suffix),
            expected=", ".join(f".{name}" for name in sorted(formats)),
            todo="end the path with .png if in doubt",
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format=picture_format, dpi=DOTS_PER_INCH, facecolor="white")
    return write_atomic(target, buffer.getvalue())


def figure_to_array(figure: Figure) -> np.ndarray:
    """Return a figure's pixels, as `SummaryWriter.add_image(..., dataformats="HWC")` takes them.

    Args:
        figure: Any matplotlib figure.

    Returns:
        (height, width, 3), uint8, red, green and blue in [0, 255]; transparent parts are white. Height and
        width are the figure's size in inches times its dots per inch.

    Raises:
        MissingDependencyError: When matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise _matplotlib_missing() from error

    previous = figure.canvas
    try:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba()).astype(np.float64)
    finally:
        # Making a canvas hands the figure over to it; the caller's own (a window, perhaps) gets it back.
        figure.set_canvas(previous)
    opacity = pixels[..., 3:] / 255
    return np.rint(pixels[..., :3] * opacity + 255 * (1 - opacity)).astype(np.uint8)


def _matplotlib_missing() -> MissingDependencyError:
    return MissingDependencyError(
        "Plots need matplotlib",
        received="an environment in which matplotlib cannot be imported",
        expected="matplotlib",
        todo='pip install "hf-semckd[plots]"',
    )


def _names(names: Sequence[str] | None, count: int, whose: str) -> list[str]:
    """Return one label a layer, made safe for matplotlib."""
    if names is None:
        return [str(index + 1) for index in range(count)]
    if isinstance(names, str) or len(names) != count:
        received = f"the text {names!r}" if isinstance(names, str) else f"{len(names)} names"
        raise InputError(
            f"{whose}_layers does not name the {whose} layers of the association",
            received=received,
            expected=f"{count} names, one for each {whose} layer",
            todo=f"pass as many names, or {whose}_layers=None to number the layers",
        )
    # Two dollar signs would switch to mathematical typesetting.
    return [str(name).replace("$", r"\$") for name in names]


def _cell_inches(layers: int) -> float:
    """Return the side of a cell: comfortable for few layers, and the map never wider than 8 inches."""
    return float(np.clip(5.4 / layers, 0.45, 0.72)) if layers <= LARGEST_ANNOTATED else min(0.45, 8.0 / layers)


def _draw_cells(axes: Axes, weights: np.ndarray) -> QuadMesh:
    student_layers, teacher_layers = weights.shape
    # Never less than twice the uniform level: the noise of an almost uniform association then stays pale instead
    # of filling the whole range of colors.
    top = min(1.0, max(float(weights.max()), 2 / teacher_layers))
    mesh = axes.pcolormesh(
        np.arange(teacher_layers + 1) - 0.5,
        np.arange(student_layers + 1) - 0.5,
        weights,
        cmap=COLOR_MAP,
        vmin=0.0,
        vmax=top,
        edgecolors="white",
        linewidth=1.2 if max(weights.shape) <= LARGEST_ANNOTATED else 0.3,
    )
    axes.set_aspect("equal")
    axes.invert_yaxis()
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def _label_axes(axes: Axes, rows: list[str], columns: list[str], title: str | None) -> None:
    # Explicit colors and sizes throughout, so that a user's style (white text, say) changes nothing.
    fontsize = 9 if max(len(rows), len(columns)) <= LARGEST_ANNOTATED else 7
    row_step, column_step = -(-len(rows) // MOST_TICKS), -(-len(columns) // MOST_TICKS)
    axes.set_yticks(range(0, len(rows), row_step), rows[::row_step], fontsize=fontsize)
    slanted = max(map(len, columns)) > 4
    axes.set_xticks(
        range(0, len(columns), column_step),
        columns[::column_step],
        fontsize=fontsize,
        rotation=40 if slanted else 0,
        ha="right" if slanted else "center",
        rotation_mode="anchor",
    )
    axes.tick_params(length=0, pad=4, colors=INK)
    axes.set_xlabel("teacher layer", fontsize=10, color=INK, labelpad=6)
    axes.set_ylabel("student layer", fontsize=10, color=INK, labelpad=6)
    if title is not None:
        axes.set_title(title, fontsize=11, color=INK, pad=10)


def _annotate(axes: Axes, mesh: QuadMesh, weights: np.ndarray, fontsize: float) -> None:
    colors = mesh.to_rgba(weights)
    for (row, column), weight in np.ndenumerate(weights):
        axes.text(
            column,
            row,
            f"{weight:.2f}",
            ha="center",
            va="center",
            fontsize=fontsize,
            color=_legible_on(colors[row, column, :3]),
        )


def _legible_on(color: np.ndarray) -> str:
    """Return black or white ink, whichever has the higher contrast by the WCAG 2 definition."""
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ np.array([0.2126, 0.7152, 0.0722]))
    # Contrast with white is 1.05 / (L + 0.05), with black (L + 0.05) / 0.05; they meet where their product is equal.
    return "white" if (luminance + 0.05) ** 2 < 1.05 * 0.05 else "black"


def _add_color_bar(axes: Axes, mesh: QuadMesh, *, teacher_layers: int, map_size: tuple[float, float]) -> None:
    """Add a bar as high as the map, with a line at the uniform level; `map_size` is (width, height) in inches."""
    from matplotlib.ticker import MaxNLocator

    width, height = map_size
    bar_axes = axes.inset_axes((1 + 0.18 / width, 0.0, 0.17 / width, 1.0))
    bar = axes.figure.colorbar(mesh, cax=bar_axes)
    # A short bar has room for two lines of label, not for a long one.
    label = "mean association weight" if height >= 1.8 else "mean association\nweight"
    bar.set_label(label, fontsize=10, color=INK, labelpad=8)
    bar.outline.set_visible(False)

    uniform, top = 1 / teacher_layers, float(mesh.get_clim()[1])
    candidates = MaxNLocator(nbins=max(2, min(6, round(2 * height))), steps=[1, 2, 5, 10]).tick_values(0.0, top)
    # A tick nearer than a line of text to the uniform level would be printed over its label.
    clear = 0.16 * top / height
    kept = [tick for tick in candidates if -1e-9 <= tick <= top * 1.001 and abs(tick - uniform) > clear]
    labels = [*(f"{tick:g}" for tick in kept), f"uniform 1/{teacher_layers}"]
    bar.set_ticks([*kept, uniform], labels=labels, fontsize=8)
    bar_axes.tick_params(length=2, colors=INK)
    line_color = _legible_on(mesh.to_rgba(np.array([uniform]))[0, :3])
    bar_axes.plot([0, 1], [uniform, uniform], color=line_color, lw=1.6, solid_capstyle="butt", label=UNIFORM_MARK)


def _fit_figure(figure: Figure, axes: Axes, canvas: FigureCanvasAgg, *, map_size: tuple[float, float]) -> None:
    """Give the figure the size of what is drawn plus a margin, the map keeping `map_size` (width, height) in inches.

    matplotlib's own layouts fit the content into a size given beforehand, which clips long names.
    """
    box = figure.get_tightbbox(canvas.get_renderer())
    margin = 0.12
    width, height = box.width + 2 * margin, box.height + 2 * margin
    left, bottom = (margin - box.x0) / width, (margin - box.y0) / height
    figure.set_size_inches(width, height)
    axes.set_position((left, bottom, map_size[0] / width, map_size[1] / height))


# Rows of weights averaged in bfloat16 miss one by a few thousandths; a real mistake misses it by far more.
ROW_SUM_TOLERANCE = 1e-2


def validate_association(association: np.ndarray) -> np.ndarray:
    """Return association weights as a float64 array after checking that they can be weights.

    Args:
        association: (student_layer, teacher_layer), each weight in [0, 1]; anything `np.asarray` takes.

    Returns:
        (student_layer, teacher_layer), float64, a copy.

    Raises:
        InputError: When it is not two-dimensional, is empty, or holds NaN, infinities or values outside [0, 1];
            it is a ValueError.
    """
    weights = np.asarray(association, dtype=np.float64)
    finite = np.isfinite(weights)
    if weights.ndim != 2 or weights.size == 0:
        received, todo = f"shape {weights.shape}", "average weights per sample over the batch (axis 0) first"
    elif not finite.all():
        received = f"{int((~finite).sum())} NaN or infinite values"
        todo = "pass `trainer.association()` after at least one logging window of training"
    elif weights.min() < -ROW_SUM_TOLERANCE or weights.max() > 1 + ROW_SUM_TOLERANCE:
        received = f"values from {weights.min():.4g} to {weights.max():.4g}"
        todo = "apply the softmax over teacher layers if these are scores"
    else:
        # Rounding may leave a weight a little outside; clip also makes the copy.
        return weights.clip(0.0, 1.0)
    raise InputError(
        "These are no association weights",
        received=received,
        expected="a (student_layer, teacher_layer) array of weights in [0, 1], at least 1 x 1",
        todo=todo,
    )
