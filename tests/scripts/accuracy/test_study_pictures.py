"""scripts/accuracy/study_pictures.py: what is drawn, and where the axis is logarithmic."""

from __future__ import annotations

import math

import numpy as np
import pytest
from accuracy.studies import NegativeMap, curves, negative_map
from accuracy.study_pictures import is_wide, plot_curves, plot_negative_map
from accuracy_cases import curve_rows, map_rows
from pictures import save_picture

from hf_semckd.errors import InputError


def test_the_picture_of_a_map(tmp_path):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    found = negative_map(map_rows(), "m")
    figure, axes = plot_negative_map(found, title="a $ and a $")
    assert isinstance(figure, Figure) and isinstance(axes, Axes)
    assert sorted(text.get_text() for text in axes.texts) == sorted(["+2.00", "-5.00", "–", "–", "–", "–"])
    low, high = axes.collections[0].get_clim()
    assert low == -high == pytest.approx(-5.0)
    path = save_picture(figure, tmp_path / "new" / "map.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_map_of_nothing_can_be_drawn():
    empty = NegativeMap(np.full((1, 1), math.nan), np.full((1, 1), math.nan), np.zeros((1, 1), int))
    plot_negative_map(empty)[0].canvas.draw()


def test_the_picture_of_curves(tmp_path):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    found = curves(curve_rows(), "c")
    figure, axes = plot_curves(found, label="weight")
    assert isinstance(figure, Figure) and isinstance(axes, Axes)
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "weight"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["kd", "semckd"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.3", "3", "30"]
    save_picture(figure, tmp_path / "curves.png")
    with pytest.raises(InputError, match="nothing to draw"):
        plot_curves([])


@pytest.mark.parametrize(
    ("values", "wide"), [([0.3, 30], True), ([200, 2000], False), ([0.0, 0.6], False), ([1, 10.1], True)]
)
def test_the_axis_is_logarithmic_beyond_a_factor_of_ten(values, wide):
    assert is_wide(np.array(values)) is wide
