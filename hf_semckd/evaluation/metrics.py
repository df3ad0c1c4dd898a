"""Quality of decisions, the share of another model's quality that is kept, agreement and calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigurationError, MissingDependencyError
from .decisions import Decisions, Labeling

RESAMPLES = 1000
BINS = 15
# By scikit-learn, for positions of one class each.
SCIKIT_LEARN = {"f1": ("f1_score", {"average": "macro"}), "matthews_correlation": ("matthews_corrcoef", {})}


@dataclass(frozen=True)
class Metric:
    """A name, and how the quality follows from decisions; with a `score` of each position it is their mean.

    Attributes:
        value: Function of predictions and labels, both (P); where there is a `score`, of the mean of the scores.
        score: Function of the decisions that gives one number for each position, or None.
        by_sample: Whether a sample counts as one, with the least of its scores.
    """

    name: str
    value: Callable[..., float]
    score: Callable[[Decisions], np.ndarray] | None = None
    by_sample: bool = False
    higher_is_better: bool = True

    def resampled(self, decisions: Decisions, draws: np.ndarray) -> np.ndarray:
        """Return the quality of each draw (R, N) of samples with replacement."""
        order, count = decisions.samples, decisions.count
        if self.score is None:
            places = np.split(np.arange(len(order)), np.searchsorted(order, np.arange(1, count)))
            taken = (np.concatenate([places[sample] for sample in draw]) for draw in draws)
            return np.array([self.value(decisions.predicted[at], decisions.labels[at]) for at in taken])
        scores = np.asarray(self.score(decisions), dtype=float)
        sums, sizes = np.bincount(order, scores, count), np.bincount(order, minlength=count).astype(float)
        if self.by_sample:
            sums, sizes = (sums == sizes).astype(float), (sizes > 0).astype(float)
        means = (sums[draw].sum() / max(sizes[draw].sum(), 1.0) for draw in draws)
        return np.array([self.value(mean) for mean in means])

    def __call__(self, decisions: Decisions) -> float:
        """Return the quality of decisions."""
        return float(self.resampled(decisions, np.arange(decisions.count)[None])[0])


def _is_right(decisions: Decisions) -> np.ndarray:
    return decisions.predicted == decisions.labels


def _surprise(decisions: Decisions) -> np.ndarray:
    assert decisions.surprise is not None, "words are classes"
    return decisions.surprise


def _correlation(predicted: np.ndarray, labels: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):  # what is constant correlates with nothing
        return float(np.corrcoef(predicted, labels)[0, 1])


ACCURACY = Metric("accuracy", float, _is_right)
EXACT_MATCH = Metric("exact_match", float, _is_right, by_sample=True)
PEARSON = Metric("pearson", _correlation)
PERPLEXITY = Metric("perplexity", lambda mean: float(np.exp(mean)), _surprise, higher_is_better=False)
BUILT_IN = {metric.name: metric for metric in (ACCURACY, EXACT_MATCH, PEARSON, PERPLEXITY)}
DEFAULTS = {
    "classes": ACCURACY,
    "multi_label": ACCURACY,
    "regression": PEARSON,
    "words": PERPLEXITY,
    "spans": EXACT_MATCH,
}


def find_metric(given: Any, labeling: Labeling) -> Metric:
    """Return a metric by name, from `evaluate.load(...)`, a function of predictions and labels, or None.

    None is the usual one of the task. Raises `ConfigurationError` for a name that is not known.
    """
    if given is None:
        return DEFAULTS.get(labeling.kind, ACCURACY)
    if isinstance(given, Metric):
        return given
    if given in BUILT_IN:
        return BUILT_IN[given]
    if given in SCIKIT_LEARN:
        return Metric(given, _from_scikit_learn(*SCIKIT_LEARN[given]))
    if hasattr(given, "compute"):
        return Metric(
            str(given.name), lambda p, y: float(next(iter(given.compute(predictions=p, references=y).values())))
        )
    if callable(given):
        return Metric(getattr(given, "__name__", "metric").strip("<>"), lambda p, y: float(given(p, y)))
    raise ConfigurationError(
        "This metric is not known",
        received=f"metric={given!r}",
        expected=f"one of {', '.join((*BUILT_IN, *SCIKIT_LEARN))}",
        todo=f"pass metric=evaluate.load({given!r}), or a function of predictions and labels",
    )


def _first(results: dict[str, Any]) -> float:
    return float(next(iter(results.values())))


def _from_scikit_learn(name: str, settings: dict[str, Any]) -> Callable[[np.ndarray, np.ndarray], float]:
    try:
        import sklearn.metrics
    except ImportError as error:
        raise MissingDependencyError(
            "This metric needs scikit-learn",
            received="an environment in which it cannot be imported",
            expected="scikit-learn",
            todo="pip install scikit-learn",
        ) from error
    function = getattr(sklearn.metrics, name)
    return lambda predicted, labels: float(function(labels, predicted, **settings))


@dataclass(frozen=True)
class Share:
    """The share of a reference's quality that is kept, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def share_kept(metric: Metric, decisions: Decisions, reference: Decisions, seed: int = 0) -> Share:
    """Return the share of the reference's quality that other decisions on the same samples keep.

    Both are evaluated on the same 1000 draws of samples with replacement; the interval holds 95 % of the shares.
    Where less is better (perplexity), the share is that of the reference over the other's. It is NaN or infinite where
    the quality that it is divided by is 0.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993 (percentile interval).
    """
    generator = np.random.default_rng(seed)
    draws = generator.integers(decisions.count, size=(RESAMPLES, decisions.count))
    draws = np.concatenate([np.arange(decisions.count)[None], draws])
    own, theirs = (metric.resampled(made, draws) for made in (decisions, reference))
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = own / theirs if metric.higher_is_better else theirs / own
    known = shares[1:][np.isfinite(shares[1:])]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
    return Share(float(shares[0]), float(low), float(high))


def agreement(decisions: Decisions, reference: Decisions) -> float:
    """Return the share of positions of which both decide the same; of numbers, their correlation."""
    if decisions.confidence is None:
        return _correlation(decisions.predicted, reference.predicted)
    return float((decisions.predicted == reference.predicted).mean())


def calibration_error(decisions: Decisions) -> float | None:
    """Return the expected calibration error over 15 bins of equal width, from 0 to 1; None in regression.

    Source: Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3.
    """
    if decisions.confidence is None:
        return None
    right, sure = _is_right(decisions), decisions.confidence
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, right - sure.astype(float), BINS)
    return float(np.abs(gaps).sum() / len(sure))
