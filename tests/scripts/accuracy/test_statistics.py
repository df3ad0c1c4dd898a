"""scripts/accuracy/statistics.py: against closed forms of Student's t, printed tables, and sums by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from accuracy import statistics


def compare(differences: list[float]) -> Any:
    """Compare values that differ so, by seed."""
    other = {seed: 0.5 for seed in range(len(differences))}
    ours = {seed: 0.5 + difference for seed, difference in enumerate(differences)}
    return statistics.compare("pair", "ours", "other", ours, other)


# ---- Paired comparisons --------------------------------------------------------------------------------------------


def test_differences_are_of_common_seeds_in_their_order():
    found = statistics.paired_differences({3: 0.9, 1: 0.5, 7: 0.1}, {1: 0.25, 2: 0.0, 3: 0.5})
    assert found.tolist() == [0.25, 0.4]


@pytest.mark.parametrize(("first", "second"), [({}, {}), ({1: 0.5}, {1: 0.5}), ({1: 0.5, 2: 0.5}, {2: 0.5, 3: 0.5})])
def test_fewer_than_two_common_seeds_are_refused(first, second):
    with pytest.raises(ValueError, match="too few common seeds"):
        statistics.paired_differences(first, second)
    with pytest.raises(ValueError, match="at least 2"):
        statistics.compare("pair", "a", "b", first, second)


def test_two_seeds_by_hand():
    """One degree of freedom is Cauchy's distribution: p = 1 - 2 atan(t) / pi, and 12.7062 covers 95 %."""
    found = compare([0.01, 0.03])
    # Mean 0.02, std sqrt(2) / 100, standard error 0.01, t = 2.
    assert (found.pair, found.method, found.other, found.n) == ("pair", "ours", "other", 2)
    assert found.mean == pytest.approx(0.02)
    assert found.std == pytest.approx(math.sqrt(2) / 100)
    assert found.interval == pytest.approx((0.02 - 0.127062, 0.02 + 0.127062), abs=1e-6)
    assert found.p == pytest.approx(1 - 2 * math.atan(2) / math.pi)
    assert found.adjusted == found.p


def test_three_seeds_by_hand():
    """Two degrees of freedom: p = 1 - t / sqrt(2 + t ** 2), and 4.3027 covers 95 %."""
    found = compare([-0.01, -0.02, -0.03])
    t = 0.02 / (0.01 / math.sqrt(3))
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert found.interval == pytest.approx((-0.02 - 4.302653 * 0.01 / math.sqrt(3), 0.0048414), abs=1e-6)


def test_five_seeds_by_hand():
    """Four degrees of freedom: P(T <= t) = 1/2 + 3/8 u (1 - u^2 / 12) with u = t / sqrt(1 + t^2 / 4); 2.7764."""
    differences = [0.01, 0.02, 0.0, 0.04, 0.03]
    found = compare(differences)
    # Squared deviations from 0.02 add to 10e-4: std sqrt(2.5e-4), t = 0.02 / sqrt(5e-5) = sqrt(8).
    u = math.sqrt(8) / math.sqrt(1 + 8 / 4)
    assert found.mean == pytest.approx(0.02)
    assert found.std == pytest.approx(math.sqrt(2.5e-4))
    assert found.p == pytest.approx(2 * (0.5 - 3 / 8 * u * (1 - u**2 / 12)))
    half = 2.776445 * math.sqrt(5e-5)
    assert found.interval == pytest.approx((0.02 - half, 0.02 + half), abs=1e-6)
    # The interval leaves zero out exactly where p is below 0.05.
    assert (found.interval[0] > 0) is (found.p < 0.05)


def test_the_sides_are_alike():
    ahead, behind = compare([0.01, 0.02, 0.05]), compare([-0.01, -0.02, -0.05])
    assert ahead.p == pytest.approx(behind.p)
    assert ahead.interval == pytest.approx(tuple(-end for end in reversed(behind.interval)))


@pytest.mark.parametrize(("difference", "p"), [(0.0, 1.0), (0.1, 0.0), (-0.1, 0.0)])
def test_equal_differences_have_no_spread(difference, p):
    # 0.7 - 0.6 and 0.4 - 0.3 differ in the last bit, which is no spread either.
    other = {1: 0.6, 2: 0.3, 3: 0.5}
    found = statistics.compare("pair", "a", "b", {seed: value + difference for seed, value in other.items()}, other)
    assert (found.p, found.std) == (p, 0.0)
    assert found.mean == pytest.approx(difference)
    assert found.interval == (found.mean, found.mean)
    assert found.verdict == {0.0: "level", 0.1: "better", -0.1: "worse"}[difference]


def test_the_verdict_is_of_the_corrected_p():
    # t = 0.012 / 0.002 = 6, so p = 1 - 6 / sqrt(38) = 0.0267: significant alone, not as one of two.
    found = [compare(differences) for differences in ([0.01, 0.01, 0.016], [-0.01, -0.01, -0.016])]
    assert found[0].p == pytest.approx(1 - 6 / math.sqrt(38))
    assert [entry.verdict for entry in found] == ["better", "worse"]
    corrected = statistics.correct(found)
    assert [entry.verdict for entry in corrected] == ["level", "level"]
    assert [entry.adjusted for entry in corrected] == pytest.approx([2 * found[0].p] * 2)
    assert [entry.p for entry in corrected] == [entry.p for entry in found]


def test_all_pairs_and_methods_are_one_family():
    accuracies = {
        "a": {"kd": {1: 0.5, 2: 0.5, 3: 0.5}, "ours": {1: 0.51, 2: 0.52, 3: 0.53}, "one": {1: 0.5}, "none": {}},
        "b": {"kd": {1: 0.5, 2: 0.5, 3: 0.5}, "ours": {1: 0.49, 2: 0.5, 3: 0.52}},
        "c": {"kd": {1: 0.5, 2: 0.5}, "ours": {}},
    }
    found = statistics.compare_all(accuracies, "ours")
    assert [(entry.pair, entry.other, entry.n) for entry in found] == [("a", "kd", 3), ("b", "kd", 3)]
    assert found[0].adjusted == pytest.approx(2 * found[0].p)
    assert found[1].adjusted == pytest.approx(found[1].p)


# ---- Holm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        # Ascending 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1; the last may not fall below the one before it.
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
        ([0.03], [0.03]),
        ([0.0, 1.0], [0.0, 1.0]),
        ([], []),
    ],
)
def test_holm_by_hand(p_values, expected):
    assert statistics.holm(p_values) == pytest.approx(expected)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_what_is_no_p_value_is_refused(wrong):
    with pytest.raises(ValueError, match="no p-values"):
        statistics.holm([0.5, wrong])


# ---- ARI -----------------------------------------------------------------------------------------------------------


def test_ari_by_hand():
    # (0.74 - 0.72) / (0.72 - 0.68) = 0.5 and (0.70 - 0.71) / (0.71 - 0.66) = -0.2: 15 % on average.
    found = statistics.ari([(0.74, 0.72, 0.68), (0.70, 0.71, 0.66)])
    assert found.percent == pytest.approx(15.0)
    assert (found.used, found.left_out) == (2, 0)


def test_pairs_where_the_other_gained_nothing_are_left_out():
    # 0.1 + 0.2 exceeds 0.3 by rounding alone.
    found = statistics.ari([(0.74, 0.72, 0.68), (0.74, 0.60, 0.68), (0.74, 0.68, 0.68), (0.74, 0.1 + 0.2, 0.3)])
    assert found.percent == pytest.approx(50.0)
    assert (found.used, found.left_out) == (1, 3)


def test_without_pairs_there_is_no_ari():
    assert statistics.ari([]) == statistics.Ari(None, 0, 0)
    assert statistics.ari([(0.7, 0.5, 0.6)]) == statistics.Ari(None, 0, 1)
