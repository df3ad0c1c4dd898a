"""Heat maps of the association of student layers with teacher layers."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, MissingDependencyError
from ..files import replacing

COLOR_MAP = "magma_r"  # perceptually uniform, readable with any color vision and in gray
INK = "#24292f"
LARGEST_ANNOTATED = 12
MOST_TICKS = 24
DOTS_PER_INCH = 150
MARGIN_INCHES = 0.12
# Weights averaged in bfloat16 may leave [0, 1] by a few thousandths; scores or logits leave it by far more.
ROUNDING = 1e-2


def plot_association(
    association: np.ndarray,
    student_layers: Sequence[str] | None = None,
    teacher_layers: Sequence[str] | None = None,
    *,
    title: str | None = None,
) -> tuple[Any, Any]:
    """Draw the mean association weights as a heat map, one row per student layer and one column per teacher layer.

    Up to 12 x 12 layers the values are written into the cells. The color bar marks the uniform level 1 / T: there a
    student layer prefers none of the T teacher layers. The figure is independent of `pyplot` and of the user's style.

    `association` is (S, T), as from `trainer.association()`; without names the layers are numbered. Returns the
    `matplotlib.figure.Figure` and the `Axes` of the map. Raises `InputError` when these are not weights, or when there
    is not one name per layer, and `MissingDependencyError` without matplotlib.
    """
    weights = validate_association(association)
    rows = _names(student_layers, weights.shape[0], "student")
    columns = _names(teacher_layers, weights.shape[1], "teacher")
    matplotlib = load_matplotlib()

    layers = max(weights.shape)
    cell = float(np.clip(5.4 / layers, 0.45, 0.72)) if layers <= LARGEST_ANNOTATED else min(0.45, 8.0 / layers)
    height, width = weights.shape[0] * cell, weights.shape[1] * cell
    # White explicitly, here and when saving: a transparent background is unreadable on a dark page.
    figure = matplotlib.figure.Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), facecolor="white")
    mesh = _draw_cells(axes, weights)
    _label_axes(axes, rows, columns, title)
    if layers <= LARGEST_ANNOTATED:
        for (row, column), weight in np.ndenumerate(weights):
            text = {"fontsize": min(9.0, 16 * cell), "color": _legible_on(mesh, weight)}
            axes.text(column, row, f"{weight:.2f}", ha="center", va="center", **text)
    _add_color_bar(axes, mesh, matplotlib.ticker.MaxNLocator, width, height)
    _fit_figure(figure, axes, width, height)
    return figure, axes


def save_association_plot(
    association: np.ndarray,
    path: str | os.PathLike[str],
    student_layers: Sequence[str] | None = None,
    teacher_layers: Sequence[str] | None = None,
    *,
    title: str | None = None,
) -> Path:
    """Draw the association with `plot_association`, write it as a whole (`files.replacing`) and return the path.

    The suffix of the path is the format (.png, .svg, .pdf, ...); another one raises `InputError`.
    """
    target = Path(path)
    figure, _ = plot_association(association, student_layers, teacher_layers, title=title)
    formats = figure.canvas.get_supported_filetypes()
    image_format = target.suffix[1:].lower()
    if image_format not in formats:
        raise InputError(
            "The suffix of the path is not an image format",
            received=repr(target.suffix),
            expected=", ".join(f".{name}" for name in sorted(formats)),
            todo="use .png if in doubt",
        )
    with replacing(target) as temporary:
        figure.savefig(temporary, format=image_format, dpi=DOTS_PER_INCH, facecolor="white")
    return target


def figure_to_array(figure: Any) -> np.ndarray:
    """Return the pixels of a figure of `plot_association`: (height, width, 3), uint8, RGB."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def validate_association(association: np.ndarray) -> np.ndarray:
    """Return (S, T) weights as float64, clipped to [0, 1]; `InputError` for what is outside by more than rounding."""
    weights = np.asarray(association, dtype=np.float64)
    finite = np.isfinite(weights)
    if weights.ndim != 2 or weights.size == 0:
        received, todo = f"shape {weights.shape}", "average weights per sample over the batch (axis 0) first"
    elif not finite.all():
        received = f"{int((~finite).sum())} NaN or infinite values"
        todo = "pass `trainer.association()` after at least one logging window of training"
    elif weights.min() < -ROUNDING or weights.max() > 1 + ROUNDING:
        received = f"values from {weights.min():.4g} to {weights.max():.4g}"
        todo = "apply the softmax over teacher layers if these are scores"
    else:
        return weights.clip(0.0, 1.0)
    raise InputError(
        "These are not association weights",
        received=received,
        expected="a (student_layer, teacher_layer) array of weights in [0, 1], at least 1 x 1",
        todo=todo,
    )


def load_matplotlib() -> Any:
    """Return matplotlib, imported on first use: it is optional and slow to import."""
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise MissingDependencyError(
            "Plots need matplotlib",
            received="an environment in which matplotlib cannot be imported",
            expected="matplotlib",
            todo='pip install "hf-semckd[plots]"',
        ) from error
    return matplotlib


def _names(names: Sequence[str] | None, count: int, whose: str) -> list[str]:
    """Return one label per layer."""
    if names is None:
        return [str(index + 1) for index in range(count)]
    if isinstance(names, str) or len(names) != count:
        raise InputError(
            f"{whose}_layers does not name the {whose} layers of the association",
            received=f"the text {names!r}" if isinstance(names, str) else f"{len(names)} names",
            expected=f"{count} names, one per {whose} layer",
            todo=f"pass as many names, or {whose}_layers=None to number the layers",
        )
    # Two dollar signs would switch to mathematical typesetting.
    return [str(name).replace("$", r"\$") for name in names]


def _draw_cells(axes: Any, weights: np.ndarray) -> Any:
    students, teachers = weights.shape
    mesh = axes.pcolormesh(
        np.arange(teachers + 1) - 0.5,
        np.arange(students + 1) - 0.5,
        weights,
        cmap=COLOR_MAP,
        vmin=0.0,
        # At least twice the uniform level, so that the noise of an almost uniform association stays pale.
        vmax=min(1.0, max(float(weights.max()), 2 / teachers)),
        edgecolors="white",
        linewidth=1.2 if max(weights.shape) <= LARGEST_ANNOTATED else 0.3,
    )
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    return mesh


def _label_axes(axes: Any, rows: list[str], columns: list[str], title: str | None) -> None:
    """Set labels and ticks, all colors and sizes explicitly: the user's style must not matter."""
    fontsize = 9 if max(len(rows), len(columns)) <= LARGEST_ANNOTATED else 7
    row_step, column_step = -(-len(rows) // MOST_TICKS), -(-len(columns) // MOST_TICKS)
    axes.set_yticks(range(0, len(rows), row_step), rows[::row_step], fontsize=fontsize)
    slanted = max(map(len, columns)) > 4
    turned = {"rotation": 40 if slanted else 0, "ha": "right" if slanted else "center", "rotation_mode": "anchor"}
    axes.set_xticks(range(0, len(columns), column_step), columns[::column_step], fontsize=fontsize, **turned)
    axes.tick_params(length=0, pad=4, colors=INK)
    axes.set_xlabel("teacher layer", fontsize=10, color=INK, labelpad=6)
    axes.set_ylabel("student layer", fontsize=10, color=INK, labelpad=6)
    if title is not None:
        axes.set_title(title, fontsize=11, color=INK, pad=10)


def _legible_on(mesh: Any, weight: float) -> str:
    """Return black or white, whichever has the higher contrast with a weight's color by the definition of WCAG 2."""
    color = np.array(mesh.to_rgba(weight)[:3])
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ np.array([0.2126, 0.7152, 0.0722]))
    # Contrast with white is 1.05 / (L + 0.05), with black (L + 0.05) / 0.05; they are equal where both squares are.
    return "white" if (luminance + 0.05) ** 2 < 1.05 * 0.05 else "black"


def _add_color_bar(axes: Any, mesh: Any, locator: Any, width: float, height: float) -> None:
    """Add a bar as high as the map, with a line at the uniform level; the map's width and height are in inches."""
    bar_axes = axes.inset_axes((1 + 0.18 / width, 0.0, 0.17 / width, 1.0))
    bar = axes.figure.colorbar(mesh, cax=bar_axes)
    label = "mean association weight" if height >= 1.8 else "mean association\nweight"
    bar.set_label(label, fontsize=10, color=INK, labelpad=8)
    bar.outline.set_visible(False)

    teachers, top = mesh.get_array().shape[1], mesh.norm.vmax
    uniform = 1 / teachers
    candidates = locator(nbins=max(2, min(6, round(2 * height))), steps=[1, 2, 5, 10]).tick_values(0.0, top)
    # A tick nearer than a line of text to the uniform level would overlap its label.
    clear = 0.16 * top / height
    kept = [tick for tick in candidates if -1e-9 <= tick <= top * 1.001 and abs(tick - uniform) > clear]
    bar.set_ticks([*kept, uniform], labels=[*(f"{tick:g}" for tick in kept), f"uniform 1/{teachers}"], fontsize=8)
    bar_axes.tick_params(length=2, colors=INK)
    line = {"color": _legible_on(mesh, uniform), "lw": 1.6, "solid_capstyle": "butt", "label": "uniform level"}
    bar_axes.plot([0, 1], [uniform, uniform], **line)


def _fit_figure(figure: Any, axes: Any, width: float, height: float) -> None:
    """Give the figure the size of its content plus a margin; the map keeps its width and height in inches.

    matplotlib's own layouts fit the content into a given size, which clips long names.
    """
    box = figure.get_tightbbox()
    full_width, full_height = box.width + 2 * MARGIN_INCHES, box.height + 2 * MARGIN_INCHES
    left, bottom = (MARGIN_INCHES - box.x0) / full_width, (MARGIN_INCHES - box.y0) / full_height
    figure.set_size_inches(full_width, full_height)
    axes.set_position((left, bottom, width / full_width, height / full_height))
