"""Quality, share kept, agreement and calibration, against loops over samples and scikit-learn."""

import math

import numpy as np
import pytest
import sklearn.metrics

from hf_semckd.errors import ConfigurationError
from hf_semckd.evaluation.decisions import Decisions, Labeling
from hf_semckd.evaluation.metrics import Metric, agreement, calibration_error, find_metric, resample, share_kept

CLASSES = Labeling("classes")


def decisions(seed=0, samples=40, right=0.6, per_sample=1):
    """Return decisions of which about this share is right."""
    random = np.random.default_rng(seed)
    rows = np.repeat(np.arange(samples), per_sample)
    labels = np.random.default_rng(1).integers(0, 3, len(rows))
    predicted = np.where(random.random(len(rows)) < right, labels, random.integers(0, 3, len(rows)))
    return Decisions(
        samples, rows, predicted, labels, random.uniform(0.3, 1, len(rows)), random.uniform(0, 2, len(rows))
    )


def kept(metric, own, reference, seed=0):
    return share_kept(metric, resample(metric, own, seed), resample(metric, reference, seed))


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews_correlation"])
def test_named_metrics_are_those_of_scikit_learn(name):
    made = decisions(per_sample=2)
    oracle = {
        "accuracy": sklearn.metrics.accuracy_score,
        "f1": lambda y, p: sklearn.metrics.f1_score(y, p, average="macro"),
        "matthews_correlation": sklearn.metrics.matthews_corrcoef,
    }[name]
    assert find_metric(name, CLASSES)(made) == pytest.approx(oracle(made.labels, made.predicted))


def test_an_exact_match_needs_both_ends_and_perplexity_is_the_exponential_of_the_mean():
    made = decisions(per_sample=2)
    both = [(made.predicted[2 * n : 2 * n + 2] == made.labels[2 * n : 2 * n + 2]).all() for n in range(40)]
    assert find_metric(None, Labeling("spans"))(made) == pytest.approx(np.mean(both))
    assert find_metric(None, Labeling("words"))(made) == pytest.approx(math.exp(made.surprise.mean()))


class Loaded:
    """What `evaluate.load` returns: a name, and `compute` with a dictionary of results."""

    name = "recall"

    @staticmethod
    def compute(predictions, references):
        return {"recall": sklearn.metrics.recall_score(references, predictions, average="macro")}


@pytest.mark.parametrize("given", [Loaded(), lambda p, y: sklearn.metrics.recall_score(y, p, average="macro")])
def test_a_loaded_metric_or_a_function_is_taken(given):
    made = decisions()
    expected = sklearn.metrics.recall_score(made.labels, made.predicted, average="macro")
    assert find_metric(given, CLASSES)(made) == pytest.approx(expected)


def test_an_unknown_name_says_what_to_pass():
    with pytest.raises(ConfigurationError, match=r"(?s)'bleu'.*accuracy.*evaluate\.load\('bleu'\)"):
        find_metric("bleu", CLASSES)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("accuracy", "regression"), ("perplexity", "regression"), ("f1", "spans"), ("pearson", "classes")],
)
def test_a_metric_of_another_task_is_refused(name, kind):
    with pytest.raises(ConfigurationError, match=f"(?s)not known for the labels.*{kind}"):
        find_metric(name, Labeling(kind))


@pytest.mark.parametrize("given", [lambda p, y: {"a": 1}, lambda p, y: None, lambda p: 1.0])
def test_a_function_that_returns_no_number_is_refused(given):
    with pytest.raises(ConfigurationError, match=r"(?s)cannot be computed.*returns one number"):
        find_metric(given, CLASSES)(decisions())


def test_several_outputs_are_correlated_one_by_one():
    random, count = np.random.default_rng(0), 30
    labels = random.normal(loc=[0, 100], size=(count, 2))
    predicted = labels[:, ::-1] + np.array([-100, 100])  # noise, of the right size
    made = Decisions(count, np.arange(count), predicted, labels)
    expected = np.mean([np.corrcoef(predicted[:, k], labels[:, k])[0, 1] for k in range(2)])
    assert find_metric(None, Labeling("regression"))(made) == pytest.approx(expected)


def test_a_share_of_a_negative_quality_is_none():
    share = share_kept(Metric("mcc", float), np.full(9, 0.2), np.full(9, -0.1))
    assert math.isnan(share.value) and math.isnan(share.low)


@pytest.mark.parametrize("name", ["accuracy", pytest.param("f1", marks=pytest.mark.slow), "perplexity"])
def test_the_interval_is_that_of_a_loop_over_draws_of_samples(name):
    teacher, student = decisions(1, right=0.9, per_sample=2), decisions(2, right=0.6, per_sample=2)
    metric = find_metric(name, CLASSES)
    found = kept(metric, student, teacher, seed=3)
    random, shares = np.random.default_rng(3), []

    def quality(made, draw):
        at = [place for sample in draw for place in np.flatnonzero(made.samples == sample)]
        if name == "perplexity":
            return math.exp(-made.surprise[at].mean())
        if name == "f1":
            return sklearn.metrics.f1_score(made.labels[at], made.predicted[at], average="macro")
        return (made.predicted[at] == made.labels[at]).mean()

    for draw in (random.integers(40, size=40) for _ in range(1000)):
        shares.append(quality(student, draw) / quality(teacher, draw))
    assert found.value == pytest.approx(quality(student, range(40)) / quality(teacher, range(40)))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(shares, (0.025, 0.975))))
    assert found.low < found.value < found.high


def test_a_reference_that_is_always_wrong_has_no_share():
    wrong = decisions()
    wrong = Decisions(wrong.count, wrong.samples, wrong.labels + 1, wrong.labels, wrong.confidence, wrong.surprise)
    assert not math.isfinite(kept(find_metric(None, CLASSES), decisions(), wrong).value)


def test_agreement_counts_equal_decisions_and_correlates_numbers():
    first, second = decisions(1), decisions(2)
    assert agreement(first, second) == pytest.approx(sum(first.predicted == second.predicted) / 40)
    numbers = [Decisions(d.count, d.samples, d.surprise[:, None], d.surprise[:, None]) for d in (first, second)]
    assert agreement(*numbers) == pytest.approx(np.corrcoef(first.surprise, second.surprise)[0, 1])


def test_the_calibration_error_is_the_weighted_gap_of_fifteen_bins():
    made, gaps = decisions(samples=500), 0.0
    for n in range(15):
        inside = (made.confidence >= n / 15) & (made.confidence < (n + 1) / 15)
        if inside.any():
            right = (made.predicted == made.labels)[inside].mean()
            gaps += inside.mean() * abs(right - made.confidence[inside].mean())
    assert calibration_error(made) == pytest.approx(gaps)
    sure = Decisions(made.count, made.samples, made.labels, made.labels, np.ones(500), made.surprise)
    assert calibration_error(sure) == 0
