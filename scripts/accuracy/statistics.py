"""Paired comparisons of methods over seeds, corrected for how many there are, and the average relative improvement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from hf_semckd.errors import InputError

ALPHA = 0.05
# Accuracies are shares of whole samples: what differs by less than this is equal, and rounding made the difference.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Comparison:
    """How a method differs from another on one pair, over the seeds that both have.

    Attributes:
        pair: The teacher and student, by the protocol's name.
        method: Whose accuracy the differences add.
        other: Whose accuracy they subtract.
        n: Number of common seeds, >= 2.
        mean: Mean of the paired differences, in shares: 0.01 is a point.
        std: Their sample standard deviation, in the same unit.
        interval: 95 % confidence interval of the mean by Student's t, low and high.
        p: Two-sided, of the paired t-test.
        adjusted: p corrected for all comparisons of a table, see `correct`; p itself for one that stands alone.
    """

    pair: str
    method: str
    other: str
    n: int
    mean: float
    std: float
    interval: tuple[float, float]
    p: float
    adjusted: float

    @property
    def verdict(self) -> str:
        """Whether `method` is "better" or "worse" than `other`, or "level": not told apart at 5 %."""
        if self.adjusted > ALPHA:
            return "level"
        return "better" if self.mean > 0 else "worse"


@dataclass(frozen=True)
class Ari:
    """An average relative improvement.

    Attributes:
        percent: The average, in percent; None where no pair has one.
        used: Number of pairs in it.
        left_out: Number of pairs without: the other method gained nothing over the student trained alone.
    """

    percent: float | None
    used: int
    left_out: int


def paired_differences(values_a: Mapping[int, float], values_b: Mapping[int, float]) -> np.ndarray:
    """Return a - b for every seed that both have.

    Args:
        values_a: Value by seed.
        values_b: Value by seed.

    Returns:
        (common_seed,), float64, by ascending seed.

    Raises:
        InputError: With fewer than two common seeds, which have no spread; it is a ValueError.
    """
    seeds = sorted(values_a.keys() & values_b.keys())
    if len(seeds) < 2:
        raise InputError(
            "There are too few common seeds to compare",
            received=f"{len(seeds)}: of {sorted(values_a)} and {sorted(values_b)}",
            expected="at least 2",
            todo="run both methods with the same seeds",
        )
    return np.array([values_a[seed] - values_b[seed] for seed in seeds], dtype=np.float64)


def compare(
    pair: str, method: str, other: str, values: Mapping[int, float], other_values: Mapping[int, float]
) -> Comparison:
    """Return the paired comparison of two methods on one pair, not yet corrected for others.

    Differences that are all the same have no spread: p is then 1 where they are 0, and otherwise 0, which is the
    limit of the test as the spread vanishes.

    Args:
        pair: The pair's name.
        method: The method's name.
        other: The other's name.
        values: Accuracy of the method by seed, in [0, 1].
        other_values: Accuracy of the other by seed, in [0, 1].

    Raises:
        InputError: With fewer than two common seeds.
    """
    differences = paired_differences(values, other_values)
    count, mean, std = len(differences), float(differences.mean()), float(differences.std(ddof=1))
    if std <= ROUNDING:
        mean = 0.0 if abs(mean) <= ROUNDING else mean
        p = 0.0 if mean else 1.0
        return Comparison(pair, method, other, count, mean, 0.0, (mean, mean), p, p)
    test = stats.ttest_1samp(differences, 0.0)
    low, high = map(float, test.confidence_interval(1 - ALPHA))
    return Comparison(pair, method, other, count, mean, std, (low, high), float(test.pvalue), float(test.pvalue))


def compare_all(accuracies: Mapping[str, Mapping[str, Mapping[int, float]]], reference: str) -> list[Comparison]:
    """Return the comparisons of a method with every other on every pair, corrected for all of them together.

    Args:
        accuracies: By pair, method and seed; in [0, 1].
        reference: The method that is compared with the others.

    Returns:
        In the order of `accuracies`, without those that have fewer than two seeds in common.
    """
    found = []
    for pair, values in accuracies.items():
        ours = values.get(reference, {})
        for other, theirs in values.items():
            if other != reference and len(ours.keys() & theirs.keys()) > 1:
                found.append(compare(pair, reference, other, ours, theirs))
    return correct(found)


def correct(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons with `adjusted` corrected for all of them together, see `holm`."""
    adjusted = holm([entry.p for entry in comparisons])
    return [replace(entry, adjusted=value) for entry, value in zip(comparisons, adjusted, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted so that the chance of any false alarm among them stays below the level they pass.

    Args:
        p_values: Of one family of tests, each in [0, 1].

    Returns:
        In the order of `p_values`, each in [0, 1] and not below what it was.

    Raises:
        InputError: When one is outside [0, 1] or NaN.

    Source:
        Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise InputError(
            "These are no p-values", received=list(p_values), expected="all in [0, 1]", todo="check the tests"
        )
    # scipy has the corrections of Benjamini and Hochberg alone.
    given = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(given, kind="stable")
    scaled = np.minimum(1.0, np.arange(len(given), 0, -1) * given[order])
    return np.maximum.accumulate(scaled)[np.argsort(order)].tolist()


def ari(pairs: Sequence[tuple[float, float, float]]) -> Ari:
    """Return by how much a method exceeds another, relative to what the other gained over the student alone.

    The mean over the pairs of (ours - other) / (other - student), in percent. Where the other gained nothing the ratio
    means nothing, and the pair is left out and counted.

    Args:
        pairs: Mean accuracies (ours, other, student), one entry a pair of teacher and student.

    Source:
        Wang et al., "SemCKD: Semantic Calibration for Cross-Layer Knowledge Distillation", 2023.
    """
    ratios = [(ours - other) / (other - student) for ours, other, student in pairs if other - student > ROUNDING]
    percent = 100 * sum(ratios) / len(ratios) if ratios else None
    return Ari(percent, len(ratios), len(pairs) - len(ratios))
