"""Averages over a logging window against plain sums, and when an association counts as collapsed."""

import math

import numpy as np
import pytest
import torch

from hf_semckd.training.monitor import LossMeter, WindowAverages


def same(tensor):
    return tensor


def random_weights(batch, students=2, teachers=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(batch, students, teachers, generator=generator) * 2, -1)


def test_terms_are_summed_shares_a_step():
    meter = LossMeter()
    for share in (0.5, 0.25, 1.0, 0.75):
        meter.add_term("task_loss", torch.tensor(share))
    meter.add_term("feature_loss", torch.tensor(6.0))
    terms = meter.average(2, same).terms
    assert terms == {"task_loss": pytest.approx(2.5 / 2), "feature_loss": pytest.approx(3.0)}


def test_an_average_ends_the_window():
    meter = LossMeter()
    assert meter.empty
    meter.add_term("task_loss", torch.tensor(1.0))
    assert not meter.empty
    meter.average(1, same)
    assert meter.empty
    meter.add_term("task_loss", torch.tensor(5.0))
    assert meter.average(1, same).terms == {"task_loss": 5.0}


def test_association_is_the_mean_over_samples_of_unequal_batches():
    batches = [random_weights(4), random_weights(1, seed=1), random_weights(3, seed=2)]
    meter = LossMeter()
    for weights in batches:
        meter.add_association(weights)
    averages = meter.average(3, same)
    samples = torch.cat(batches).double().numpy()
    np.testing.assert_allclose(averages.association, sum(samples) / 8, rtol=1e-6)
    np.testing.assert_allclose(averages.spread, samples.std(axis=0), rtol=1e-5)
    np.testing.assert_allclose(averages.association.sum(1), 1.0, rtol=1e-6)


def test_entropy_is_in_nats_and_averaged_over_samples_and_layers():
    weights = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], [[1 / 3] * 3, [0.25, 0.75, 0.0]]])
    meter = LossMeter()
    meter.add_association(weights)
    rows = [math.log(2), 0.0, math.log(3), -0.25 * math.log(0.25) - 0.75 * math.log(0.75)]
    assert meter.average(1, same).terms["association/entropy"] == pytest.approx(sum(rows) / 4, rel=1e-6)


def test_errors_are_weighted_by_the_association_and_averaged_over_samples():
    batches, generator = [random_weights(4), random_weights(2, seed=1)], torch.Generator().manual_seed(3)
    errors = [torch.rand(weights.shape, generator=generator) for weights in batches]
    for entry in errors:
        entry[:, 1] = math.nan  # a layer that is left to the logits
    meter = LossMeter()
    for weights, entry in zip(batches, errors, strict=True):
        meter.add_association(weights, entry)
    found = meter.average(2, same)
    by_hand = [
        sum(float(w) * float(e) for w, e in zip(weights[i, 0], entry[i, 0], strict=True))
        for weights, entry in zip(batches, errors, strict=True)
        for i in range(len(weights))
    ]
    assert found.errors[0] == pytest.approx(sum(by_hand) / 6, rel=1e-6) and math.isnan(found.errors[1])
    assert np.isfinite(found.association).all() and math.isfinite(found.terms["association/entropy"])


def test_counts_are_added_in_the_same_reduction():
    meter, seen = LossMeter(), []
    meter.add_term("task_loss", torch.tensor(1.0))
    found = meter.average(1, lambda sums: seen.append(sums) or 2 * sums, [7, 3])
    assert len(seen) == 1 and found.counts == (14, 6) and found.terms == {"task_loss": 2.0}


def test_processes_are_added_in_one_reduction():
    """Two processes that saw the same: terms (shares) double, means over samples stay."""
    calls = []

    def two_processes(tensor):
        calls.append(tensor)
        return tensor * 2

    meter, weights = LossMeter(), random_weights(4)
    meter.add_term("logit_loss", torch.tensor(1.5))
    meter.add_association(weights)
    averages = meter.average(1, two_processes)
    assert len(calls) == 1
    assert averages.terms["logit_loss"] == pytest.approx(3.0)
    np.testing.assert_allclose(averages.association, weights.double().numpy().mean(0), rtol=1e-6)
    assert averages.terms["association/entropy"] < math.log(3)


def test_long_windows_lose_no_precision():
    """In float32, 1e-3 beside 1e8 would be gone."""
    meter = LossMeter()
    for _ in range(100):
        meter.add_term("task_loss", torch.tensor(1e8))
        meter.add_term("task_loss", torch.tensor(1e-3))
    assert meter.average(1, same).terms["task_loss"] == pytest.approx(100 * 1e8 + 0.1, rel=1e-13)


def test_a_meter_keeps_no_graph():
    value = torch.tensor(2.0, requires_grad=True)
    meter = LossMeter()
    meter.add_term("task_loss", value * 3)
    meter.add_association(torch.softmax(value * torch.ones(2, 1, 2), -1))
    assert not any(term.requires_grad for term in meter._terms.values())
    assert meter._association is not None and not meter._association.requires_grad


def averages(association, spread=0.0):
    association = np.asarray(association, dtype=float)
    return WindowAverages({}, association, np.full_like(association, spread))


ON_ONE = [[0.99, 0.01], [0.98, 0.02]]


def test_all_layers_on_one_teacher_layer_at_the_bound_is_a_collapse():
    assert averages(ON_ONE).collapsed(1.0)


def test_the_bound_is_what_the_association_can_reach_at_most():
    """The published cosines at temperature 1 cannot pass 0.88 of two layers: 0.87 is as far as it goes."""
    weights = [[0.87, 0.13], [0.86, 0.14]]
    bound = 1 / (1 + math.exp(-2))
    assert averages(weights).collapsed(bound)
    assert not averages(weights).collapsed(1.0)


@pytest.mark.parametrize(
    ("entry", "bound"),
    [
        (averages([[0.99, 0.01], [0.01, 0.99]]), 1.0),  # each student layer has its own
        (averages(ON_ONE, spread=0.05), 1.0),  # samples differ
        (averages([[0.99, 0.01], [0.6, 0.4]]), 1.0),  # one student layer is undecided
        (averages([[0.5, 0.5], [0.5, 0.5]]), 1.0),
        (averages(ON_ONE), None),  # fixed weights: chosen, not collapsed
        (averages([[1.0], [1.0]]), 1.0),  # a single teacher layer
        (WindowAverages({}, None, None), 1.0),
    ],
)
def test_anything_else_is_none(entry, bound):
    assert not entry.collapsed(bound)
