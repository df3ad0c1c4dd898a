"""Quality of decisions, the share of another model's quality that is kept, agreement and calibration."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigurationError, MissingDependencyError
from ..publishing.report.parts import Bin
from ..publishing.rows import Share
from .decisions import Decisions, Labeling

RESAMPLES = 1000
BINS = 15
# By scikit-learn, for positions of one class each.
SCIKIT_LEARN = {"f1": ("f1_score", {"average": "macro"}), "matthews_correlation": ("matthews_corrcoef", {})}


@dataclass(frozen=True)
class Metric:
    """A name, and how the quality follows from decisions; with a `score` of each position it is their mean.

    Attributes:
        value: Function of predictions and labels, (P) or (P, K); where there is a `score`, of the mean of the scores.
        score: Function of the decisions that gives one number for each position, or None.
        by_sample: Whether a sample counts as one, with the least of its scores.
        kinds: The kinds of labels that it is for, see `Labeling`; empty for all.
    """

    name: str
    value: Callable[..., float]
    score: Callable[[Decisions], np.ndarray] | None = None
    by_sample: bool = False
    higher_is_better: bool = True
    kinds: tuple[str, ...] = ()

    def resampled(self, decisions: Decisions, draws: Iterable[np.ndarray]) -> np.ndarray:
        """Return the quality of each draw of samples (N) with replacement."""
        order, count = decisions.samples, decisions.count
        if self.score is None:
            places = np.split(np.arange(len(order)), np.searchsorted(order, np.arange(1, count)))
            taken = (np.concatenate([places[sample] for sample in draw]) for draw in draws)
            return np.array([self._number(decisions.predicted[at], decisions.labels[at]) for at in taken])
        scores = np.asarray(self.score(decisions), dtype=float)
        sums, sizes = np.bincount(order, scores, count), np.bincount(order, minlength=count).astype(float)
        if self.by_sample:
            sums, sizes = ((sums == sizes) & (sizes > 0)).astype(float), (sizes > 0).astype(float)
        means = (sums[draw].sum() / max(sizes[draw].sum(), 1.0) for draw in draws)
        return np.array([self.value(mean) for mean in means])

    def _number(self, predicted: np.ndarray, labels: np.ndarray) -> float:
        try:
            return float(self.value(predicted, labels))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"The metric {self.name!r} cannot be computed",
                received=str(error),
                expected="a function of predictions and labels that returns one number",
                todo="pass such a function as metric, or the name of one for this task",
            ) from error

    def __call__(self, decisions: Decisions) -> float:
        """Return the quality of decisions."""
        return float(self.resampled(decisions, [np.arange(decisions.count)])[0])


def _is_right(decisions: Decisions) -> np.ndarray:
    return decisions.predicted == decisions.labels


def _surprise(decisions: Decisions) -> np.ndarray:
    assert decisions.surprise is not None, "labels are classes"
    return decisions.surprise


def _correlation(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return Pearson's correlation, the mean over the outputs where there are several."""
    pairs = zip(np.atleast_2d(predicted.T), np.atleast_2d(labels.T), strict=True)
    with np.errstate(invalid="ignore"):  # what is constant correlates with nothing
        return float(np.mean([np.corrcoef(own, other)[0, 1] for own, other in pairs]))


LABELED = ("classes", "words", "multi_label")
ACCURACY = Metric("accuracy", float, _is_right, kinds=LABELED)
EXACT_MATCH = Metric("exact_match", float, _is_right, by_sample=True, kinds=(*LABELED, "spans"))
PEARSON = Metric("pearson", _correlation, kinds=("regression",))
PERPLEXITY = Metric(
    "perplexity", lambda mean: float(np.exp(mean)), _surprise, higher_is_better=False, kinds=("words", "classes")
)
BUILT_IN = {metric.name: metric for metric in (ACCURACY, EXACT_MATCH, PEARSON, PERPLEXITY)}
DEFAULTS = {"regression": PEARSON, "words": PERPLEXITY, "spans": EXACT_MATCH}


def find_metric(given: Any, labeling: Labeling) -> Metric:
    """Return a metric by name, from `evaluate.load(...)`, a function of predictions and labels, or a `Metric`.

    None is the usual one of the task. Raises `ConfigurationError` for a name that is not known, or of another task.
    """
    if given is None:
        return DEFAULTS.get(labeling.kind, ACCURACY)
    if isinstance(given, str):
        return _named(given, labeling)
    if isinstance(given, Metric):
        return given
    if hasattr(given, "compute"):
        name = getattr(given, "name", None) or "metric"
        return Metric(str(name), lambda p, y: next(iter(given.compute(predictions=p, references=y).values())))
    if callable(given):
        return Metric(getattr(given, "__name__", "metric").strip("<>"), given)
    raise _unknown_metric(given, labeling)


def _named(name: str, labeling: Labeling) -> Metric:
    known = {**BUILT_IN}
    if name in SCIKIT_LEARN:
        known[name] = Metric(name, _from_scikit_learn(*SCIKIT_LEARN[name]), kinds=("classes", "words"))
    if name not in known or labeling.kind not in known[name].kinds:
        raise _unknown_metric(name, labeling)
    return known[name]


def _unknown_metric(given: Any, labeling: Labeling) -> ConfigurationError:
    fitting = [metric.name for metric in BUILT_IN.values() if labeling.kind in metric.kinds]
    fitting += SCIKIT_LEARN if labeling.kind in ("classes", "words") else []
    return ConfigurationError(
        "This metric is not known for the labels",
        received=f"metric={given!r}, labels of the kind {labeling.kind!r}",
        expected=f"one of {', '.join(fitting)}",
        todo=f"pass metric=evaluate.load({given!r}), or a function of predictions and labels",
    )


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


def resample(metric: Metric, decisions: Decisions, seed: int = 0) -> np.ndarray:
    """Return the quality of all samples, and of 1000 draws with replacement, which are the same for equal seeds."""
    generator, count = np.random.default_rng(seed), decisions.count
    draws = (generator.integers(count, size=count) for _ in range(RESAMPLES))
    return metric.resampled(decisions, itertools.chain([np.arange(count)], draws))


def share_kept(metric: Metric, own: np.ndarray, reference: np.ndarray) -> Share:
    """Return the share of the reference's quality that is kept, from what `resample` gives for both.

    The interval holds 95 % of the shares. Where less is better (perplexity), the share is that of the reference over
    the other's. It is NaN where the quality that it is divided by is not positive.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993 (percentile interval).
    """
    over, under = (own, reference) if metric.higher_is_better else (reference, own)
    shares = np.where(under > 0, over / np.where(under > 0, under, 1.0), np.nan)
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
    bins = confidence_bins(decisions)
    if not bins:
        return None
    total = sum(entry.count for entry in bins)
    return sum(entry.count * abs(entry.right - entry.confidence) for entry in bins) / total


def confidence_bins(decisions: Decisions) -> tuple[Bin, ...]:
    """Return the decisions in 15 bins of equal width by their confidence, without empty ones; none in regression."""
    if decisions.confidence is None:
        return ()
    right, sure = _is_right(decisions), decisions.confidence.astype(float)
    places = np.minimum((sure * BINS).astype(int), BINS - 1)
    sums = (np.bincount(places, minlength=BINS), np.bincount(places, sure, BINS), np.bincount(places, right, BINS))
    return tuple(Bin(int(n), float(s / n), float(r / n)) for n, s, r in zip(*sums, strict=True) if n)
