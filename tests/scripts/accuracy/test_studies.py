"""scripts/accuracy/studies.py: maps, curves and tables of mismatch by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from accuracy.studies import (
    curve_table,
    curves,
    mismatch_table,
    mismatches,
    negative_map,
    negative_sentence,
    negative_table,
)
from accuracy_cases import curve_rows, map_rows, row

from hf_semckd.errors import InputError


def test_a_map_is_paired_by_seed():
    found = negative_map(map_rows(), "m")
    assert found.n.tolist() == [[2, 0, 0], [0, 0, 1]]
    assert found.mean[0, 0] == pytest.approx(0.02) and found.mean[1, 2] == pytest.approx(-0.05)
    assert found.std[0, 0] == pytest.approx(0.02 / math.sqrt(2))
    assert math.isnan(found.std[1, 2])
    assert np.isnan(found.mean).sum() == 4


def test_another_baseline():
    found = negative_map(map_rows(), "m", "semckd")
    assert found.mean[0, 0] == pytest.approx(-0.19) and found.n[0, 0] == 1


def test_the_table_of_a_map_is_in_points():
    found = negative_map(map_rows(), "m")
    lines = negative_table(found).splitlines()
    assert lines[0] == "| layer | teacher 1 | teacher 2 | teacher 3 |"
    assert lines[2] == "| student 1 | +2.00 ± 1.41 (n = 2) | - | - |"
    assert lines[3] == "| student 2 | - | - | -5.00 (n = 1) |"
    assert negative_sentence(found).startswith("1 of 2 pairs of layers give a lower")


@pytest.mark.parametrize("missing", ["kd", "pair-"])
def test_a_map_needs_the_baseline_and_pairs(missing):
    rows = [entry for entry in map_rows() if not entry["method"].startswith(missing)]
    with pytest.raises(InputError, match="no map of m yet"):
        negative_map(rows, "m")


def test_curves_are_means_over_seeds_by_ascending_value():
    kd, semckd = curves(curve_rows(), "c")
    assert (kd.method, semckd.method) == ("kd", "semckd")
    assert kd.values.tolist() == semckd.values.tolist() == [0.3, 3.0, 30.0]
    np.testing.assert_allclose(kd.mean, [0.2, math.nan, 0.6])
    np.testing.assert_allclose(kd.error, [math.nan, math.nan, 0.1 / math.sqrt(3)])
    assert kd.n.tolist() == [1, 0, 3]
    assert semckd.error[1] == pytest.approx(0.1)


def test_curves_of_chosen_methods_in_their_order():
    found = curves(curve_rows(), "c", ["teacher", "kd", "rkd"])
    assert [curve.method for curve in found] == ["teacher", "kd", "rkd"]
    assert found[2].n.sum() == 0


def test_the_table_of_curves_is_in_percent():
    lines = curve_table(curves(curve_rows(), "c")).splitlines()
    assert lines[0] == "| method | 0.3 | 3 | 30 |"
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["kd", "20.00", "-", "60.00 ± 5.77"]


def test_curves_need_rows_of_numbers():
    with pytest.raises(InputError, match="no curve of d yet"):
        curves(curve_rows(), "d")
    with pytest.raises(InputError, match="no point of a curve"):
        curves([row("c@wide", "kd", 0, 0.5)], "c")


def test_the_table_of_scores():
    rows = [
        row("a", "semckd", 0, 0.5, extras={"mismatch": 1.0}),
        row("a", "semckd", 1, 0.5, extras={"mismatch": 2.0}),
        row("a", "semckd", 2, 0.5, split="tuning", extras={"mismatch": 9.0}),
        row("a", "kd", 0, 0.5),
        row("b", "semckd-uniform", 0, 0.5, extras={"mismatch": 0.0}),
        row("c", "kd", 0, 0.5),
    ]
    assert mismatches(rows, ["a", "c"]) == {"a": {"semckd": [1.0, 2.0]}, "c": {}}
    lines = mismatch_table(rows, ["a", "b", "c"]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["method", "a", "b"]
    assert cells[2:] == [["semckd", "1.500 ± 0.707", "-"], ["semckd-uniform", "-", "0.000"]]
    with pytest.raises(InputError, match="no semantic mismatch scores yet"):
        mismatch_table(rows, ["c"])
