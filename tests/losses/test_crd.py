"""Contrastive distillation against loops over its objective, and the ring that it keeps."""

import copy
import math

import numpy as np
import pytest
import torch
from embedding_cases import MASK, SCENARIOS, HeadCases, normal, shape_of, vectors

from hf_semckd.errors import ConfigurationError
from hf_semckd.losses.crd import CRDLoss


def problem(scenario, batch=8, negatives=16, **options):
    """Return a loss, features of both models, and the masks of both (text only)."""
    torch.manual_seed(0)
    students, teachers = SCENARIOS[scenario]
    loss = CRDLoss(students, teachers, negatives=negatives, **options).double()
    student = [normal(batch, *shape_of(spec), seed=s) for s, spec in enumerate(students)]
    teacher = [normal(batch, *shape_of(spec), seed=50 + t) for t, spec in enumerate(teachers)]
    masks = (MASK[:batch], MASK[:batch]) if scenario == "text" else (None, None)
    return loss, student, teacher, masks


def embedded(rows, head):
    """Return the embeddings of unit length."""
    out = [head.weight.detach().numpy() @ row + head.bias.detach().numpy() for row in rows]
    return [row / math.sqrt(row @ row) for row in out]


def estimate(anchors, others, stored):
    """Return the mean of exp(g) over all negatives of a batch."""
    pairs = [(x, y) for i, x in enumerate(anchors) for j, y in enumerate([*others, *stored]) if i != j]
    return np.mean([math.exp(x @ y / 0.07) for x, y in pairs])


def objective(anchors, others, stored, constant):
    """Return -log h of each pair minus the sum of log(1 - h) over its negatives."""
    found = []
    for i, anchor in enumerate(anchors):
        negatives = [other for j, other in enumerate(others) if j != i] + list(stored)

        noise = len(negatives) * constant
        positive = math.exp(anchor @ others[i] / 0.07)
        scores = [math.exp(anchor @ other / 0.07) for other in negatives]
        found.append(
            -math.log(positive / (positive + noise)) - sum(math.log(1 - score / (score + noise)) for score in scores)
        )
    return np.array(found)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_loss_is_that_of_the_objective_batch_after_batch(scenario):
    loss, student, teacher, masks = problem(scenario, negatives=20)
    stored, constants = ([], []), None
    for batch in range(4):
        student, teacher = [[feature + batch * 0.3 for feature in features] for features in (student, teacher)]
        own = embedded(vectors(student, scenario), loss.student_head)
        theirs = embedded(vectors(teacher, scenario), loss.teacher_head)
        if constants is None:
            constants = estimate(own, theirs, []), estimate(theirs, own, [])
        expected = objective(own, theirs, stored[1], constants[0]) + objective(theirs, own, stored[0], constants[1])
        out = loss(student, teacher, *masks)
        np.testing.assert_allclose(out.per_sample.detach(), expected, rtol=1e-8)
        assert float(out.total.detach()) == pytest.approx(expected.mean(), rel=1e-8)
        np.testing.assert_allclose(loss.log_normalizer.exp(), constants, rtol=1e-10)
        stored = (stored[0] + own)[-20:], (stored[1] + theirs)[-20:]
    assert int(loss.seen) == 32


def advance(loss, batch, seed, training=True):
    """Run one batch of embeddings, and return what the heads make of it."""
    loss.train(training)
    student, teacher = normal(batch, 1, 5, seed=seed), normal(batch, 1, 7, seed=seed + 100)
    out = loss([student], [teacher])
    heads = (loss.student_head(student[:, 0]), loss.teacher_head(teacher[:, 0]))
    return out, [head.detach() / head.detach().norm(dim=1, keepdim=True) for head in heads]


def small(negatives, **options):
    torch.manual_seed(0)
    return CRDLoss([(1, 5)], [(1, 7)], negatives=negatives, **options).double()


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [7, 7], [9, 1], [20], [7, 20, 2], [14]])
def test_the_ring_holds_the_latest_embeddings_of_both_models(sizes):
    loss, history = small(7), ([], [])
    assert loss.student_ring.shape == loss.teacher_ring.shape == (7, 128)
    for seed, size in enumerate(sizes):
        _, embeddings = advance(loss, size, seed)
        for past, rows in zip(history, embeddings, strict=True):
            past.extend(rows)
        for ring, past in zip((loss.student_ring, loss.teacher_ring), history, strict=True):
            expected = torch.zeros(7, 128, dtype=torch.float64)
            for number in range(max(0, len(past) - 7), len(past)):
                expected[number % 7] = past[number]
            torch.testing.assert_close(ring, expected, rtol=1e-12, atol=1e-14)
        assert int(loss.seen) == len(history[0]) and not loss.student_ring.requires_grad


def test_evaluation_leaves_everything_as_it_is():
    loss = small(7)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    first, _ = advance(loss, 4, 0, training=False)
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    trained, _ = advance(loss, 4, 0)
    assert torch.equal(first.per_sample, trained.per_sample)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    advance(loss, 4, 1, training=False)
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    assert before["seen"] == 4


def test_a_loss_that_is_restored_goes_on_as_if_it_had_never_stopped():
    loss, other = small(7), small(7)
    for seed in range(3):
        advance(loss, 3, seed)
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    assert {"student_ring", "teacher_ring", "seen", "log_normalizer"} <= set(loss.state_dict())
    for seed in range(3, 5):
        assert torch.equal(advance(loss, 3, seed)[0].per_sample, advance(other, 3, seed)[0].per_sample)
    assert torch.equal(loss.teacher_ring, other.teacher_ring) and int(other.seen) == 15


def test_batches_of_one_learn_from_those_before():
    loss = small(7)
    first, _ = advance(loss, 1, 0)
    assert first.total == 0 and int(loss.seen) == 1 and not loss.log_normalizer.isfinite().any()
    second, _ = advance(loss, 1, 1)
    assert second.total > 0 and second.total.isfinite() and loss.log_normalizer.isfinite().all()


def test_backward_works_after_the_ring_was_written():
    loss = small(7)
    advance(loss, 4, 0)
    out, _ = advance(loss, 4, 1)
    again, _ = advance(loss, 4, 2)
    (out.total + again.total).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in loss.parameters())


def test_matched_embeddings_have_a_lower_loss_than_shuffled_ones():
    loss, rows = CRDLoss([(1, 5)], [(1, 5)], negatives=4).double().eval(), normal(8, 1, 5)
    loss.teacher_head.load_state_dict(loss.student_head.state_dict())
    assert loss([rows], [rows]).total < loss([rows], [rows.roll(1, 0)]).total


def test_large_scores_stay_finite():
    loss = small(7, embedding_size=1).float()
    student = torch.tensor([1e4, -1e4, 1e4]).view(3, 1, 1).expand(3, 1, 5).clone().requires_grad_()
    out = loss([student], [torch.ones(3, 1, 7)])
    out.total.backward()
    assert out.total.isfinite() and student.grad.isfinite().all()


def test_the_published_sizes_are_the_defaults():
    loss = CRDLoss([(1, 5)], [(1, 7)])
    assert loss.student_ring.shape == loss.teacher_ring.shape == (16384, 128)
    assert loss.student_head.weight.shape == (128, 5) and loss.teacher_head.weight.shape == (128, 7)


@pytest.mark.parametrize("negatives", [0, -1])
def test_a_ring_without_room_is_refused(negatives):
    with pytest.raises(ConfigurationError, match=f"(?s)negatives={negatives}.*at least 1"):
        CRDLoss([(1, 5)], [(1, 7)], negatives=negatives)


def test_the_weight_is_the_published_one():
    assert CRDLoss.default_weight == 0.8


class TestContrastive(HeadCases):
    problem = staticmethod(problem)

    def settle(self, loss, student, teacher, masks):
        loss(student, teacher, *masks), loss.eval()  # a batch that fixes the normalizer
