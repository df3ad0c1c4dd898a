"""Relations between samples against loops over their equations, and the ring of negatives."""

import copy
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from embedding_cases import MASK, SCENARIOS, HeadCases, RelationCases, normal, shape_of, vectors
from kept import named
from layer_cases import SCENARIOS as LAYER_SCENARIOS
from layer_cases import B, LayerCases, features_of

from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.losses.relations import CCLoss, CRDLoss, PKTLoss, RKDLoss, SPLoss, gaussian_correlations


def problem(method, scenario, batch=8, **options):
    """Return a loss on embeddings, features of both models, and the masks of both (text only)."""
    torch.manual_seed(0)
    students, teachers = SCENARIOS[scenario]
    loss = method(students, teachers, **options).double()
    student = [normal(batch, *shape_of(spec), seed=s) for s, spec in enumerate(students)]
    teacher = [normal(batch, *shape_of(spec), seed=50 + t) for t, spec in enumerate(teachers)]
    masks = (MASK[:batch], MASK[:batch]) if scenario == "text" else (None, None)
    return loss, student, teacher, masks


@pytest.mark.parametrize(("method", "weight"), [(SPLoss, 3000.0), (PKTLoss, 30000.0), (RKDLoss, 1.0), (CCLoss, 0.02)])
def test_the_published_weight_is_the_default(method, weight):
    assert method.default_weight == weight


def sp_problem(scenario):
    """Return a loss on layers, features of both models, and the masks of both."""
    students, teachers, own, theirs, aligned = LAYER_SCENARIOS[scenario]
    torch.manual_seed(0)
    loss = SPLoss(students, teachers, tokens_aligned=aligned).double()
    return loss, features_of(students, 0), features_of(teachers, 50), own, theirs


def rows_of(feature, mask):
    """Return the similarities of every two samples, a sample at a time, each row of unit length."""
    feature = feature.detach().numpy()
    table = []
    for i in range(len(feature)):
        row = []
        for k in range(len(feature)):
            product = 0.0
            for place in np.ndindex(*feature.shape[1:]):
                if mask is None or (mask[i, place[0]] and mask[k, place[0]]):
                    product += feature[(i, *place)] * feature[(k, *place)]
            row.append(product)
        length = math.sqrt(sum(value**2 for value in row))
        table.append([value / length for value in row])
    return table


def sp_oracle(loss, scenario, student, teacher):
    own, theirs = LAYER_SCENARIOS[scenario][2:4]
    left, right = rows_of(student[-1], own), rows_of(teacher[-1], theirs)
    return np.array([sum((right[i][k] - left[i][k]) ** 2 for k in range(B)) / B for i in range(B)])


@pytest.mark.parametrize("scenario", LAYER_SCENARIOS)
def test_sp_gradients_reach_the_student_and_the_parameters_and_not_the_teacher(scenario):
    loss, student, teacher, own, theirs = sp_problem(scenario)
    for feature in [*student, *teacher]:
        feature.requires_grad_()
    loss(student, teacher, own, theirs).total.backward()
    compared = [len(student) - 1]
    assert all((feature.grad is not None) == (s in compared) for s, feature in enumerate(student))
    assert all(student[s].grad.abs().sum() > 0 for s in compared)
    assert all(entry.grad is not None and entry.grad.abs().sum() > 0 for entry in loss.parameters())
    assert len(list(loss.parameters())) == 0
    assert all(feature.grad is None for feature in teacher)


@pytest.mark.parametrize("scenario", LAYER_SCENARIOS)
def test_sp_a_batch_of_one_has_nothing_to_compare(scenario):
    loss, student, teacher, own, theirs = sp_problem(scenario)
    masks = [None if mask is None else mask[:1] for mask in (own, theirs)]
    student = [feature[:1].clone().requires_grad_() for feature in student]
    out = loss(student, [feature[:1] for feature in teacher], *masks)
    out.total.backward()
    assert out.per_sample.shape == (1,) and float(out.total.detach()) < 1e-25
    assert student[-1].grad.abs().max() < 1e-12


def test_sp_of_the_teacher_only_the_used_layers_are_kept():
    loss, student, teacher, own, theirs = sp_problem("text")
    kept = loss.select(teacher, theirs)
    assert set(named(kept)) == {*(f"whole.{t}" for t in [2]), "mask"}
    assert torch.equal(loss(student, kept, own).per_sample, loss(student, teacher, own, theirs).per_sample)


def test_sp_no_layer_is_refused():
    with pytest.raises(InputError, match="no student layer"):
        SPLoss([], [(6, 4)])
    with pytest.raises(InputError, match="no teacher layer"):
        SPLoss([(6, 4)], [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sp_half_precision_features_are_compared_in_float32(dtype):
    loss, student, teacher, own, theirs = sp_problem("text")
    # Squares of these are beyond float16.
    student, teacher = [(500 * entry).to(dtype) for entry in student], [(500 * entry).to(dtype) for entry in teacher]
    out = loss.float()([entry.requires_grad_() for entry in student], teacher, own, theirs)
    wide = [entry.detach().double() for entry in student], [entry.double() for entry in teacher]
    expected = loss.double()(*wide, own, theirs).per_sample.detach()
    assert out.per_sample.dtype is torch.float32
    torch.testing.assert_close(out.per_sample.detach().double(), expected, rtol=2e-4, atol=1e-6)


def test_sp_the_total_is_the_squared_frobenius_norm_over_the_squared_batch_size():
    loss, student, teacher, own, theirs = sp_problem("text")
    left, right = np.array(rows_of(student[-1], own)), np.array(rows_of(teacher[-1], theirs))
    expected = np.linalg.norm(right - left, "fro") ** 2 / B**2
    assert float(loss(student, teacher, own, theirs).total) == pytest.approx(expected, rel=1e-9)


def test_sp_three_samples_are_worked_out_by_hand():
    loss = SPLoss([(1, 2)], [(1, 2)]).double()
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]], dtype=torch.float64).unsqueeze(1)
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 3.0]], dtype=torch.float64).unsqueeze(1)
    half, fifth = math.sqrt(1 / 2), math.sqrt(1 / 5)
    # Student rows: (1, 0, 0), (0, 1, 2) / sqrt 5 twice. Teacher rows: (1, 1, 0) / sqrt 2 twice, (0, 0, 1).
    expected = [
        (1 - half) ** 2 + half**2,
        half**2 + (half - fifth) ** 2 + (2 * fifth) ** 2,
        fifth**2 + (1 - 2 * fifth) ** 2,
    ]
    np.testing.assert_allclose(loss([student], [teacher]).per_sample, np.array(expected) / 3, rtol=1e-12)


def test_sp_neither_scale_nor_rotation_of_the_features_matters():
    loss = SPLoss([(6, 4)], [(6, 4)]).double()
    student, rotation = normal(B, 6, 4), torch.linalg.qr(normal(4, 4, seed=1))[0]
    assert float(loss([student], [-3 * student @ rotation]).total) < 1e-25
    assert float(loss([student], [student.abs()]).total) > 1e-3


def test_sp_a_sample_without_any_token_gives_no_nan():
    loss, student, teacher, own, _ = sp_problem("text")
    mask = own.clone()
    mask[2] = 0
    student = [feature.requires_grad_() for feature in student]
    out = loss(student, teacher, mask, mask)
    out.total.backward()
    assert float(out.per_sample[2].detach()) == 0 and float(out.total.detach()) > 0
    assert student[-1].grad.isfinite().all() and student[-1].grad[2].abs().max() == 0


class TestSimilarityPreserving(LayerCases):
    problem = staticmethod(sp_problem)
    oracle = staticmethod(sp_oracle)
    scenarios = LAYER_SCENARIOS


def probabilities(rows):
    """Return p[i][j], the shifted cosine over the sum of its row."""
    table = []
    for x in rows:
        kernel = [(x @ y / math.sqrt((x @ x) * (y @ y)) + 1) / 2 for y in rows]
        table.append([entry / sum(kernel) for entry in kernel])
    return table


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_pkt_the_loss_is_that_of_the_equations(scenario):
    loss, student, teacher, masks = problem(PKTLoss, scenario)
    own, theirs = probabilities(vectors(student, scenario)), probabilities(vectors(teacher, scenario))
    expected = [
        sum(t * math.log((t + 1e-7) / (s + 1e-7)) for s, t in zip(own[i], theirs[i], strict=True)) / 8
        for i in range(8)
    ]
    out = loss(student, teacher, *masks)
    np.testing.assert_allclose(out.per_sample, expected, rtol=1e-9)
    assert float(out.total) == pytest.approx(sum(expected) / 8, rel=1e-10) and out.total > 1e-5


def test_pkt_a_student_that_differs_by_a_rotation_and_by_lengths_has_no_loss():
    _, _, teacher, masks = problem(PKTLoss, "text")
    same = PKTLoss([(6, 7)], [(6, 7)])
    rotation = torch.linalg.qr(normal(7, 7))[0]
    assert same([3 * teacher[1] @ rotation], teacher[1:], *masks).total.abs() < 1e-12


class TestProbabilisticTransfer(RelationCases):
    problem = staticmethod(partial(problem, PKTLoss))


def distances(rows):
    """Return the distances over the mean of those that are not zero."""
    table = np.array([[math.sqrt(sum((x - y) ** 2)) for y in rows] for x in rows])
    return table / np.mean([entry for entry in table.flatten() if entry > 0])


def angle(vertex, j, k):
    """Return the cosine of the angle at `vertex`, zero where a side has no length."""
    sides = math.sqrt(sum((j - vertex) ** 2)), math.sqrt(sum((k - vertex) ** 2))
    return 0.0 if min(sides) == 0 else (j - vertex) @ (k - vertex) / (sides[0] * sides[1])


def huber(difference):
    return difference**2 / 2 if abs(difference) <= 1 else abs(difference) - 0.5


def shares(own, theirs, distance_weight=25, angle_weight=50):
    """Return the loss of each sample."""
    size, near, far = len(own), distances(own), distances(theirs)
    found = []
    for i in range(size):
        lengths = [huber(near[i, j] - far[i, j]) for j in range(size)]
        angles = [
            huber(angle(own[i], own[j], own[k]) - angle(theirs[i], theirs[j], theirs[k]))
            for j, k in itertools.product(range(size), repeat=2)
        ]
        found.append(distance_weight * sum(lengths) / size + angle_weight * sum(angles) / size**2)
    return found


@pytest.mark.parametrize("weights", [(25, 50), (1, 0), (0, 3)])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_rkd_the_loss_is_that_of_the_equations(scenario, weights):
    options = {"distance_weight": weights[0], "angle_weight": weights[1]} if weights != (25, 50) else {}
    loss, student, teacher, masks = problem(RKDLoss, scenario, **options)
    expected = shares(vectors(student, scenario), vectors(teacher, scenario), *weights)
    out = loss(student, teacher, *masks)
    np.testing.assert_allclose(out.per_sample, expected, rtol=1e-10)
    assert float(out.total) == pytest.approx(sum(expected) / 8, rel=1e-10)


def test_rkd_large_errors_count_linearly():
    loss = RKDLoss([(1, 1)], [(1, 1)], distance_weight=1, angle_weight=0).double()
    student = torch.zeros(8, 1, 1, dtype=torch.float64)
    student[0] = 1.0
    teacher = torch.arange(8.0, dtype=torch.float64).view(8, 1, 1) ** 3
    own, theirs = list(student[:, 0].numpy()), list(teacher[:, 0].numpy())
    assert np.abs(distances(own) - distances(theirs)).max() > 1
    np.testing.assert_allclose(loss([student], [teacher]).per_sample, shares(own, theirs, 1, 0), rtol=1e-10)


def test_rkd_identical_samples_have_no_distance_and_no_direction():
    loss, student, teacher, masks = problem(RKDLoss, "maps")
    student[1][3], teacher[1][5] = student[1][1], teacher[1][2]
    expected = shares(vectors(student, "maps"), vectors(teacher, "maps"))
    np.testing.assert_allclose(loss(student, teacher, *masks).per_sample, expected, rtol=1e-10)


def test_rkd_a_student_that_differs_by_a_rotation_a_shift_and_scale_has_no_loss():
    _, _, teacher, masks = problem(RKDLoss, "text")
    same = RKDLoss([(6, 7)], [(6, 7)])
    rotation = torch.linalg.qr(normal(7, 7))[0]
    assert same([3 * teacher[1] @ rotation + 2], teacher[1:], *masks).total < 1e-12


class TestRelational(RelationCases):
    problem = staticmethod(partial(problem, RKDLoss))


def correlations(rows, head):
    """Return the Taylor series of the Gaussian kernel of every two embeddings of unit length."""
    embedded = [head.weight.detach().numpy() @ row + head.bias.detach().numpy() for row in rows]
    units = [row / math.sqrt(row @ row) for row in embedded]

    def kernel(x, y):
        return math.exp(-0.8) * (1 + 0.8 * (x @ y) + (0.8 * (x @ y)) ** 2 / 2)

    return [[kernel(x, y) for y in units] for x in units]


@pytest.mark.parametrize("size", [256, 3])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_cc_the_loss_is_that_of_the_equation(scenario, size):
    loss, student, teacher, masks = problem(CCLoss, scenario, **({"embedding_size": size} if size != 256 else {}))
    own = correlations(vectors(student, scenario), loss.student_head)
    theirs = correlations(vectors(teacher, scenario), loss.teacher_head)
    expected = [sum((s - t) ** 2 for s, t in zip(own[i], theirs[i], strict=True)) / 8 for i in range(8)]
    out = loss(student, teacher, *masks)
    np.testing.assert_allclose(out.per_sample.detach(), expected, rtol=1e-9)
    assert float(out.total.detach()) == pytest.approx(sum(expected) / 8, rel=1e-10)
    assert loss.student_head.weight.shape == (size, 5) and loss.teacher_head.weight.shape == (size, 7)


def test_cc_the_series_is_close_to_the_gaussian_kernel_of_near_samples():
    rows = normal(6, 4)
    rows = rows / rows.norm(dim=1, keepdim=True)
    squares = (rows[:, None] - rows[None]).square().sum(-1)
    series = gaussian_correlations(5 * rows)
    torch.testing.assert_close(series, torch.exp(-0.4 * squares), rtol=0, atol=0.08)
    assert torch.allclose(series.diagonal(), torch.tensor(math.exp(-0.8) * 2.12, dtype=torch.float64))


class TestCorrelationCongruence(HeadCases):
    problem = staticmethod(partial(problem, CCLoss))


def crd_problem(scenario, batch=8, negatives=16, **options):
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
def test_crd_the_loss_is_that_of_the_objective_batch_after_batch(scenario):
    loss, student, teacher, masks = crd_problem(scenario, negatives=20)
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
def test_crd_the_ring_holds_the_latest_embeddings_of_both_models(sizes):
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


def test_crd_evaluation_leaves_everything_as_it_is():
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


def test_crd_a_loss_that_is_restored_goes_on_as_if_it_had_never_stopped():
    loss, other = small(7), small(7)
    for seed in range(3):
        advance(loss, 3, seed)
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    assert {"student_ring", "teacher_ring", "seen", "log_normalizer"} <= set(loss.state_dict())
    for seed in range(3, 5):
        assert torch.equal(advance(loss, 3, seed)[0].per_sample, advance(other, 3, seed)[0].per_sample)
    assert torch.equal(loss.teacher_ring, other.teacher_ring) and int(other.seen) == 15


def test_crd_batches_of_one_learn_from_those_before():
    loss = small(7)
    first, _ = advance(loss, 1, 0)
    assert first.total == 0 and int(loss.seen) == 1 and not loss.log_normalizer.isfinite().any()
    second, _ = advance(loss, 1, 1)
    assert second.total > 0 and second.total.isfinite() and loss.log_normalizer.isfinite().all()


def test_crd_backward_works_after_the_ring_was_written():
    loss = small(7)
    advance(loss, 4, 0)
    out, _ = advance(loss, 4, 1)
    again, _ = advance(loss, 4, 2)
    (out.total + again.total).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in loss.parameters())


def test_crd_matched_embeddings_have_a_lower_loss_than_shuffled_ones():
    loss, rows = CRDLoss([(1, 5)], [(1, 5)], negatives=4).double().eval(), normal(8, 1, 5)
    loss.teacher_head.load_state_dict(loss.student_head.state_dict())
    assert loss([rows], [rows]).total < loss([rows], [rows.roll(1, 0)]).total


def test_crd_large_scores_stay_finite():
    loss = small(7, embedding_size=1).float()
    student = torch.tensor([1e4, -1e4, 1e4]).view(3, 1, 1).expand(3, 1, 5).clone().requires_grad_()
    out = loss([student], [torch.ones(3, 1, 7)])
    out.total.backward()
    assert out.total.isfinite() and student.grad.isfinite().all()


def test_crd_the_published_sizes_are_the_defaults():
    loss = CRDLoss([(1, 5)], [(1, 7)])
    assert loss.student_ring.shape == loss.teacher_ring.shape == (16384, 128)
    assert loss.student_head.weight.shape == (128, 5) and loss.teacher_head.weight.shape == (128, 7)


@pytest.mark.parametrize("negatives", [0, -1])
def test_crd_a_ring_without_room_is_refused(negatives):
    with pytest.raises(ConfigurationError, match=f"(?s)negatives={negatives}.*at least 1"):
        CRDLoss([(1, 5)], [(1, 7)], negatives=negatives)


def test_crd_the_weight_is_the_published_one():
    assert CRDLoss.default_weight == 0.8


class TestContrastive(HeadCases):
    problem = staticmethod(crd_problem)

    def settle(self, loss, student, teacher, masks):
        loss(student, teacher, *masks), loss.eval()  # a batch that fixes the normalizer
