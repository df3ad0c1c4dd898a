"""scripts/step_cost/growth.py: exponents by hand."""

from __future__ import annotations

import math

import pytest
from step_cost.growth import growth_rows, slope


def test_the_slope_of_a_power_is_its_exponent():
    sizes = [2, 4, 8]
    assert slope(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    # By hand: log2 of the sizes 1, 2, 3 and of the times 0, 0, 3; (-1 * -1 + 0 + 1 * 2) / 2.
    assert slope(sizes, [1.0, 1.0, 8.0]) == pytest.approx(1.5)
    assert slope([1, math.e], [2.0, 2.0]) == pytest.approx(0.0)


def test_the_growth_table_has_a_line_for_each_form():
    axes = {"batch": {"exponent": 0.987}, "student_layers": {"exponent": 1.5}}
    assert growth_rows({"default": {"axes": axes}}) == [{"form": "default", "batch": "0.99", "student layers": "1.50"}]
