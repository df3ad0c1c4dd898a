import itertools
import os
import sys

import numpy as np
import pytest
from launching import python

from hf_semckd.errors import InputError, MissingDependencyError
from hf_semckd.publishing.plots import (
    figure_to_array,
    plot_association,
    save_association_plot,
    validate_association,
)

matplotlib = pytest.importorskip("matplotlib")
from matplotlib import style  # noqa: E402

STYLES = ["dark_background", "ggplot"]


def weights(student_layers, teacher_layers, seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(teacher_layers, 0.6), size=student_layers)


def cell_color(axes, pixels, row, column):
    """The color of a cell as drawn, near its lower left corner, where no text is."""
    x, y = axes.transData.transform((column - 0.4, row + 0.4))
    return pixels[pixels.shape[0] - 1 - round(y), round(x)].astype(int)


def contrast(first, second):
    """WCAG 2.2, contrast ratio of two sRGB colors in [0, 255], written out from the standard."""

    def luminance(color):
        linear = [c / 12.92 if (c := value / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for value in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(first), luminance(second)])
    return (high + 0.05) / (low + 0.05)


def test_each_weight_is_drawn_in_its_row_and_column():
    association = np.array([[0.1, 0.2, 0.7], [0.8, 0.15, 0.05]])
    figure, axes = plot_association(association)
    pixels = figure_to_array(figure)
    darkness = [[-cell_color(axes, pixels, row, column).sum() for column in range(3)] for row in range(2)]
    # The larger a weight, the darker its cell, over the whole map.
    assert np.argsort(np.ravel(darkness)).tolist() == np.argsort(association.ravel()).tolist()
    # Row 0 above row 1, column 0 to the left of column 1, in pixels.
    (x, y), (right, _), (_, below) = axes.transData.transform([(0, 0), (1, 0), (0, 1)])
    assert right > x and below < y


def test_labels_and_names():
    figure, axes = plot_association(weights(2, 3), ["stem", "stage 2"], ["a", "b", "c"], title="ResNet")
    assert axes.get_xlabel() == "teacher layer"
    assert axes.get_ylabel() == "student layer"
    assert axes.get_title() == "ResNet"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["stem", "stage 2"]
    assert axes.figure is figure


def test_layers_without_names_are_numbered_from_one():
    _, axes = plot_association(weights(2, 3))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3"]


@pytest.mark.parametrize(("shape", "texts"), [((3, 4), 12), ((12, 12), 144), ((3, 13), 0), ((13, 3), 0)])
def test_values_are_written_up_to_twelve_layers(shape, texts):
    association = weights(*shape)
    _, axes = plot_association(association)
    assert len(axes.texts) == texts
    for text in axes.texts:
        column, row = text.get_position()
        assert text.get_text() == f"{association[row, column]:.2f}"


@pytest.mark.parametrize("association", [weights(4, 12), np.eye(3), np.linspace(0, 1, 100).reshape(10, 10)])
def test_values_are_legible(association):
    figure, axes = plot_association(association)
    pixels = figure_to_array(figure)
    for text in axes.texts:
        column, row = text.get_position()
        ink = 255 * np.array(matplotlib.colors.to_rgb(text.get_color()))
        # 4.5 is WCAG's minimum (level AA) for text of ordinary size.
        assert contrast(cell_color(axes, pixels, row, column), ink) >= 4.5


@pytest.mark.parametrize(
    ("shape", "title"),
    [((3, 4), "t"), ((4, 12), None), ((12, 12), None), ((1, 1), "a long title " * 3), ((30, 50), "")],
)
@pytest.mark.parametrize("name", ["{}", "encoder.layers.{}.output"])
def test_nothing_is_cut_off(shape, title, name):
    names = [[name.format(index) for index in range(count)] for count in shape]
    figure, _ = plot_association(weights(*shape), *names, title=title)
    pixels = figure_to_array(figure)
    border = np.concatenate([pixels[:5], pixels[-5:]]), np.concatenate([pixels[:, :5], pixels[:, -5:]])
    assert all((part == 255).all() for part in border)
    # And no wide empty margin either.
    assert (pixels[30:-30, 30:-30] != pixels[0, 0]).any()
    assert (pixels[:40] != 255).any() and (pixels[:, -40:] != 255).any() and (pixels[:, :40] != 255).any()


def color_bar(axes):
    (bar,) = axes.child_axes
    return bar


@pytest.mark.parametrize(("shape", "uniform"), [((3, 4), 0.25), ((2, 12), 1 / 12), ((1, 1), 1.0)])
def test_color_bar_marks_the_uniform_level(shape, uniform):
    _, axes = plot_association(weights(*shape))
    bar = color_bar(axes)
    (line,) = [line for line in bar.lines if line.get_label() == "uniform level"]
    np.testing.assert_allclose(line.get_ydata(), uniform)
    assert bar.get_ylabel().replace("\n", " ") == "mean association weight"
    labels = {label.get_text(): tick for label, tick in zip(bar.get_yticklabels(), bar.get_yticks(), strict=True)}
    assert labels[f"uniform 1/{shape[1]}"] == pytest.approx(uniform)
    numbers = {label: tick for label, tick in labels.items() if not label.startswith("uniform")}
    assert all(float(label) == pytest.approx(tick) for label, tick in numbers.items())


# The uniform level lies on a tick (5 layers, 0.2) or close to one (11 layers, 0.0909 and 0.1).
@pytest.mark.parametrize("association", [weights(2, 3), np.eye(5), np.eye(11) * 0.45 + 0.05, weights(4, 24)])
def test_color_bar_labels_do_not_overlap(association):
    figure, axes = plot_association(association)
    figure_to_array(figure)
    boxes = sorted((label.get_window_extent() for label in color_bar(axes).get_yticklabels()), key=lambda box: box.y0)
    assert all(lower.y1 <= upper.y0 for lower, upper in itertools.pairwise(boxes))


def test_noise_about_the_uniform_level_does_not_fill_the_range():
    association = np.full((3, 4), 0.25) + np.array([0.002, -0.002, 0.001, -0.001])
    _, axes = plot_association(association)
    assert color_bar(axes).get_ylim() == pytest.approx((0.0, 0.5))


def test_dollar_signs_in_names_are_text():
    figure, _ = plot_association(np.eye(2), ["$a_$", "$"], ["b$c$", "^$_{$"])
    figure_to_array(figure)


@pytest.mark.parametrize("name", STYLES)
def test_the_style_of_the_user_changes_nothing(name, tmp_path):
    expected = figure_to_array(plot_association(weights(3, 4), title="t")[0])
    saved = save_association_plot(weights(3, 4), tmp_path / "expected.png").read_bytes()
    with style.context(name), matplotlib.rc_context({"savefig.facecolor": "black", "savefig.transparent": True}):
        np.testing.assert_array_equal(figure_to_array(plot_association(weights(3, 4), title="t")[0]), expected)
        assert save_association_plot(weights(3, 4), tmp_path / "styled.png").read_bytes() == saved


@pytest.mark.parametrize(
    ("association", "received"),
    [
        (np.full((2, 3, 4), 0.25), r"\(2, 3, 4\)"),
        (np.full(4, 0.25), r"\(4,\)"),
        (np.zeros((0, 4)), r"\(0, 4\)"),
        (np.array([[0.5, np.nan]]), "1 NaN or infinite"),
        (np.array([[np.inf, -np.inf]]), "2 NaN or infinite"),
        (np.array([[1.5, -0.5]]), "from -0.5 to 1.5"),
    ],
)
def test_what_are_no_weights_is_refused(association, received):
    with pytest.raises(ValueError, match=f"received: .*{received}(.|\n)*expected: (.|\n)*what to do: "):
        validate_association(association)


def test_validation_copies_and_clips_what_rounding_left_over():
    weights = np.array([[1.004, -0.004], [0.0, 1.0]])
    checked = validate_association(weights)
    np.testing.assert_array_equal(checked, np.eye(2))
    checked[0, 0] = 0.5
    assert weights[0, 0] == 1.004


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ((np.full((2, 2, 2), 0.5),), r"\(2, 2, 2\)"),
        ((np.array([[np.nan, 1.0]]),), "NaN"),
        ((np.array([[3.0, -2.0]]),), "from -2 to 3"),
        ((np.eye(2), ["a"]), "1 names(.|\n)*2 names"),
        ((np.eye(2), None, ["a", "b", "c"]), "3 names(.|\n)*2 names"),
        ((np.eye(2), "ab"), "text 'ab'"),
    ],
)
def test_bad_input_is_refused(arguments, received):
    with pytest.raises(ValueError, match=f"received: (.|\n)*{received}(.|\n)*what to do: "):
        plot_association(*arguments)


def test_a_saved_picture_is_opaque_and_the_figure(tmp_path):
    image = pytest.importorskip("PIL.Image")
    path = save_association_plot(weights(3, 4), tmp_path / "new" / "map.png", title="t")
    assert path == tmp_path / "new" / "map.png"
    with image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGBA"))
    assert (pixels[..., 3] == 255).all() and (pixels[0, 0] == 255).all()
    np.testing.assert_array_equal(pixels[..., :3], figure_to_array(plot_association(weights(3, 4), title="t")[0]))
    assert [file.name for file in path.parent.iterdir()] == ["map.png"]


@pytest.mark.parametrize(("ending", "start"), [("svg", b"<?xml"), ("PDF", b"%PDF")])
def test_the_ending_is_the_format(tmp_path, ending, start):
    names = ["layer.0", "layer.1"]
    path = save_association_plot(np.eye(2), str(tmp_path / f"map.{ending}"), names, names)
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["map", "map.docx"])
def test_an_ending_that_is_no_picture_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"\.png"):
        save_association_plot(np.eye(2), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_picture(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    target = tmp_path / "map.png"
    target.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_association_plot(np.eye(2), target)
    assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_array_of_a_figure():
    figure, _ = plot_association(weights(3, 4))
    pixels = figure_to_array(figure)
    width, height = figure.get_size_inches() * figure.dpi
    assert pixels.dtype == np.uint8 and pixels.shape == (int(height), int(width), 3)
    assert pixels.flags.owndata and (pixels[0, 0] == 255).all()


def test_without_matplotlib_the_message_tells_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name == "matplotlib" or name.startswith("matplotlib.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r'pip install "hf-semckd\[plots\]"'):
        plot_association(np.eye(2))


HEADLESS = """
import sys
import hf_semckd.publishing.plots as visualization
assert "matplotlib" not in sys.modules, "importing the module must not import matplotlib"
visualization.save_association_plot([[0.5, 0.5]], sys.argv[1])
visualization.figure_to_array(visualization.plot_association([[0.5, 0.5]])[0])
assert "matplotlib.pyplot" not in sys.modules, "pyplot keeps figures and may open windows"
"""


def test_without_a_display_and_without_pyplot(tmp_path):
    changes = {"MPLBACKEND": "tkagg", "MPLCONFIGDIR": str(tmp_path), "DISPLAY": ""}
    done = python("-c", HEADLESS, tmp_path / "map.png", **changes)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "map.png").stat().st_size > 0
