"""SemCKD against oracles written from the equations: the published form, the calibrated form, what sets them apart."""

import copy
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from naive import batch_normalize, convolve, normal, pool, relative
from scipy import special
from torch import nn

from hf_semckd.config import SemCKDConfig
from hf_semckd.errors import ConfigurationError, InputError, RaggedBatchError
from hf_semckd.features.layers import FeatureSpec
from hf_semckd.features.statistics import PRIOR_POSITIONS, VARIANCE_FLOOR
from hf_semckd.losses import SemCKDLoss
from hf_semckd.losses.semckd.projection import layers_per_projection
from hf_semckd.training.options import loss_options

ASSOCIATIONS = ["similarity", "learned", "uniform", "last", "one_to_one"]
PROJECTORS = ["shared", "pairwise"]


def project_map(maps, layers):
    """1x1 convolution, BN, ReLU, 3x3 convolution, BN, ReLU, 1x1 convolution."""
    maps = batch_normalize(convolve(maps, layers[0].weight), layers[1]).clamp(min=0)
    maps = batch_normalize(convolve(maps, layers[3].weight), layers[4]).clamp(min=0)
    return convolve(maps, layers[6].weight)


def two_layers(rows, first, last):
    hidden = (rows @ first.weight.T + first.bias).clamp(min=0)
    out = hidden @ last.weight.T + last.bias
    return out / (out * out).sum(1, keepdim=True).sqrt()


def softmax(logits):
    powers = logits.exp()
    return powers / powers.sum(-1, keepdim=True)


# (a) The published form


def published_oracle(loss, student, teacher):
    """Compute total and attention of the published form, with the weights of `loss`."""
    size = len(student[0])

    def embed(features, net):
        rows = features.reshape(size, -1)
        return two_layers(rows @ rows.T, net[0], net[2])

    queries = [embed(features, net) for features, net in zip(student, loss.query, strict=True)]
    keys = [embed(features, net) for features, net in zip(teacher, loss.key, strict=True)]
    logits = [torch.stack([(query * key).sum(1) for key in keys], 1) for query in queries]
    attention = torch.stack([softmax(entry) for entry in logits], 1)
    total = 0
    for s, t in itertools.product(range(len(student)), range(len(teacher))):
        size_st = tuple(min(a, b) for a, b in zip(student[s].shape[2:], teacher[t].shape[2:], strict=True))
        projected = project_map(pool(student[s], size_st), loss.projection[s][t])
        error = ((projected - pool(teacher[t], size_st)) ** 2).mean((1, 2, 3))
        total = total + (attention[:, s, t] * error).sum()
    return total / (size * len(student)), attention


GRIDS = {
    "equal": ([(4, 4, 4), (6, 2, 2)], [(5, 4, 4), (3, 2, 2)]),
    "student larger": ([(4, 8, 8), (6, 6, 6)], [(5, 4, 4), (3, 2, 2), (7, 3, 3)]),
    "student smaller": ([(4, 2, 2), (6, 1, 1), (3, 3, 3)], [(5, 4, 4), (3, 7, 7)]),
    "not square, not divisible": ([(4, 5, 3), (2, 2, 6)], [(5, 3, 4), (3, 7, 2)]),
    "twelve layers each": ([(2, 2, 2)] * 12, [(2, 2, 2)] * 12),
}


def published_problem(grids, batch=8, seed=0, dtype=torch.float64):
    student_shapes, teacher_shapes = GRIDS[grids]
    torch.manual_seed(seed)
    loss = SemCKDLoss.published(student_shapes, teacher_shapes, batch).to(dtype)
    student = [normal(batch, *shape, seed=seed + s, dtype=dtype) for s, shape in enumerate(student_shapes)]
    teacher = [normal(batch, *shape, seed=seed + 50 + t, dtype=dtype) * 2 for t, shape in enumerate(teacher_shapes)]
    return loss, student, teacher


@pytest.mark.parametrize("grids", GRIDS)
def test_published_total_and_attention_are_those_of_the_equations(grids):
    loss, student, teacher = published_problem(grids)
    out = loss(student, teacher)
    total, attention = published_oracle(loss, student, teacher)
    assert relative(out.total, total) < 1e-10
    assert relative(out.association, attention) < 1e-10
    assert out.association.std() > 1e-3, "a constant attention would not test the networks"
    assert relative(out.per_sample.mean(), total) < 1e-10 and out.per_sample.shape == (8,)


@pytest.mark.parametrize("grids", GRIDS)
def test_published_gradients_of_features_and_parameters_are_those_of_the_equations(grids):
    loss, student, teacher = published_problem(grids)
    inputs = [[feature.clone().requires_grad_() for feature in student] for _ in range(2)]
    parameters = list(loss.parameters())
    actual = torch.autograd.grad(loss(inputs[0], teacher).total, [*inputs[0], *parameters])
    expected = torch.autograd.grad(published_oracle(loss, inputs[1], teacher)[0], [*inputs[1], *parameters])
    scale = max(float(entry.norm()) for entry in expected)
    for left, right in zip(actual, expected, strict=True):
        assert float((left - right).norm()) < 1e-9 * max(float(right.norm()), 1e-6 * scale)


def test_published_gradient_of_features_agrees_with_finite_differences():
    loss, student, teacher = published_problem("student larger")
    student[0].requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, teacher).total, student[:1])
    for seed in range(3):
        direction, step = normal(*student[0].shape, seed=200 + seed), 1e-6
        with torch.no_grad():
            ahead = loss([student[0] + step * direction, *student[1:]], teacher).total
            behind = loss([student[0] - step * direction, *student[1:]], teacher).total
        assert float((gradient * direction).sum()) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-5)


def test_published_parameters_are_laid_out_as_in_the_paper():
    loss, _, _ = published_problem("student larger", batch=16)
    assert (len(loss.query), len(loss.key), len(loss.projection)) == (2, 3, 2)
    assert [len(row) for row in loss.projection] == [3, 3]
    for net in [*loss.query, *loss.key]:
        linear = [layer for layer in net if isinstance(layer, nn.Linear)]
        assert [(layer.in_features, layer.out_features) for layer in linear] == [(16, 8), (8, 4)]
        assert all(layer.bias is not None for layer in linear)
    for s, t in itertools.product(range(2), range(3)):
        convolutions = [layer for layer in loss.projection[s][t] if isinstance(layer, nn.Conv2d)]
        c_s, c_t = GRIDS["student larger"][0][s][0], GRIDS["student larger"][1][t][0]
        shapes = [tuple(layer.weight.shape) for layer in convolutions]
        assert shapes == [(2 * c_t, c_s, 1, 1), (2 * c_t, 2 * c_t, 3, 3), (c_t, 2 * c_t, 1, 1)]
        assert all(layer.bias is None for layer in convolutions)
        assert sum(isinstance(layer, nn.BatchNorm2d) for layer in loss.projection[s][t]) == 2


def test_twelve_by_twelve_layers_have_144_projections_of_their_own():
    loss, _, _ = published_problem("twelve layers each")
    firsts = [loss.projection[s][t][0].weight for s, t in itertools.product(range(12), repeat=2)]
    assert len({entry.data_ptr() for entry in firsts}) == 144
    assert len({tuple(entry.flatten().tolist()) for entry in firsts}) == 144
    owners = {name.rsplit(".", 2)[0] for name in loss.state_dict() if name.startswith("projection.")}
    assert len(owners) == 144 and {"projection.1.11", "projection.11.1"} <= owners


def test_published_has_no_statistics_and_no_learned_scale():
    loss, _, _ = published_problem("equal")
    assert {name.split(".")[0] for name in loss.state_dict()} == {"query", "key", "projection"}
    assert not loss.needs_statistics and loss.required_batch_size == 8


def test_published_weights_stay_within_the_bound_of_unit_vectors():
    loss, student, teacher = published_problem("student larger")
    attention = loss(student, teacher).association
    assert loss.upper_bound == pytest.approx(math.e / (math.e + 2 / math.e))
    assert attention.max() <= loss.upper_bound and attention.min() >= 1 / (1 + 2 * math.e**2)


def test_published_takes_token_layers_one_position_at_a_time():
    torch.manual_seed(0)
    loss = SemCKDLoss.published([(5, 4)], [(5, 3), (5, 6)], 8).double()
    student, teacher = [normal(8, 5, 4)], [normal(8, 5, 3, seed=1), normal(8, 5, 6, seed=2)]
    as_maps = [[feature.mT.unsqueeze(3) for feature in features] for features in (student, teacher)]
    out, attention = loss(student, teacher), loss(student, teacher).association
    errors = [
        ((project_map(as_maps[0][0], loss.projection[0][t]) - as_maps[1][t]) ** 2).mean((1, 2, 3)) for t in range(2)
    ]
    expected = (attention[:, 0] * torch.stack(errors, 1)).sum(1).mean()
    assert loss.projection[0][0][3].kernel_size == (1, 1)
    assert relative(out.total, expected) < 1e-10


# (b) Ragged batches


@pytest.mark.parametrize("size", [1, 7, 9])
def test_published_refuses_a_ragged_batch_and_says_how_to_avoid_it(size):
    loss, student, teacher = published_problem("equal")
    cut = [torch.cat([feature, feature])[:size] for feature in student]
    with pytest.raises(RaggedBatchError, match=rf"(?s)a batch of {size}.*8 samples.*dataloader_drop_last=True"):
        loss(cut, [torch.cat([feature, feature])[:size] for feature in teacher])


@pytest.mark.parametrize("association", ASSOCIATIONS)
@pytest.mark.parametrize("size", [8, 7, 3, 1])
def test_calibrated_takes_any_batch_size_with_the_same_parameters(association, size):
    loss, student, teacher = problem("maps", association, "shared")
    out = loss([feature[:size] for feature in student], [feature[:size] for feature in teacher])
    assert out.per_sample.shape == (size,) and out.total.isfinite()


# (c) The calibrated form

MASK = (torch.arange(6) < torch.tensor([[3], [6], [1], [5], [2], [4], [6], [2]])).long()


def image_tokens(channels, side, prefix):
    return FeatureSpec("image tokens", "tokens", channels, prefix + side * side, (side, side), prefix)


# Name: student layers, teacher layers, how each pair must be aligned, masked, one tokenization.
SCENARIOS = {
    "maps": ([(4, 6, 6), (5, 3, 3)], [(6, 4, 4), (3, 6, 6), (6, 2, 2)], "grid", False, True),
    "text": ([(6, 4), (6, 5)], [(6, 6), (6, 3), (6, 6)], "tokens", True, True),
    "other tokenization": ([(6, 4), (6, 5)], [(9, 6), (9, 3), (9, 6)], "mean", True, False),
    "cnn to vit": ([(4, 6, 6), (5, 2, 2)], [image_tokens(6, 3, 1), image_tokens(3, 3, 1)], "grid", False, True),
    "vit to cnn": ([image_tokens(4, 4, 2), image_tokens(4, 4, 2)], [(6, 4, 4), (3, 2, 2)], "grid", False, True),
    "vit to vit": ([image_tokens(4, 3, 1)] * 2, [image_tokens(6, 3, 1)] * 3, "tokens", False, True),
}
TEMPERATURE = 0.3


def shape_of(spec):
    if not isinstance(spec, FeatureSpec):
        return tuple(spec)
    return (spec.length, spec.channels)


def features_of(specs, seed, scale=1.0):
    return [normal(8, *shape_of(spec), seed=seed + n) * scale * (n + 1) + n for n, spec in enumerate(specs)]


def problem(scenario, association="similarity", projector="shared", **options):
    students, teachers, _, _, aligned = SCENARIOS[scenario]
    torch.manual_seed(0)
    loss = SemCKDLoss(
        students,
        teachers,
        association=association,
        projector=projector,
        association_temperature=TEMPERATURE,
        tokens_aligned=aligned,
        **options,
    ).double()
    if association == "learned" and loss.required_batch_size is None:
        loss.association.scale.log.data.fill_(0.6)
    return loss, features_of(students, 0), features_of(teachers, 60, scale=3.0)


def masks_of(scenario):
    """Return the masks of student and teacher; another tokenization has a length of its own."""
    if not SCENARIOS[scenario][3]:
        return None, None
    if scenario == "other tokenization":
        return MASK, (torch.arange(9) < torch.tensor([[9], [2], [5], [1], [7], [3], [4], [8]])).long()
    return MASK, MASK


def grid_map(feature, spec):
    """Return a map, or the patches among image tokens as one, written out cell by cell."""
    if feature.dim() == 4:
        return feature
    side = spec.grid[0]
    cells = [[feature[:, spec.prefix + h * side + w] for w in range(side)] for h in range(side)]
    return torch.stack([torch.stack(row, 2) for row in cells], 2)


def kept_positions(feature, mask):
    """Return for every sample the list of its position vectors that count."""
    rows = feature.flatten(2).mT if feature.dim() == 4 else feature
    return [[rows[i, n] for n in range(rows.shape[1]) if mask is None or mask[i, n]] for i in range(len(rows))]


def sample_means(feature, mask):
    return torch.stack([torch.stack(rows).mean(0) for rows in kept_positions(feature, mask)])


def standardize(feature, compared):
    """Standardize every channel by its moments over all positions of this batch that are compared."""
    values = torch.stack([row for rows in compared for row in rows]).numpy()
    mean, variance = values.mean(0), values.var(0)
    typical, count = variance.mean(), len(values)
    shrunk = (count * variance + PRIOR_POSITIONS * typical) / (count + PRIOR_POSITIONS)
    scale = np.sqrt(shrunk + VARIANCE_FLOOR * typical)
    shape = (-1, 1, 1) if feature.dim() == 4 else (-1,)
    return (feature - torch.from_numpy(mean).view(shape)) / torch.from_numpy(scale).view(shape)


class CalibratedOracle:
    """The calibrated form over samples, student layers, teacher layers and positions, one at a time."""

    def __init__(self, loss, scenario, student, teacher):
        self.loss, self.student, self.kind = loss, student, SCENARIOS[scenario][2]
        self.masks, self.raw = masks_of(scenario), teacher
        self.specs = SCENARIOS[scenario][:2]
        compared = zip(teacher, self.specs[1], strict=True)
        self.targets = [standardize(feature, self.compared(feature, spec)) for feature, spec in compared]

    def compared(self, feature, spec):
        """Return the position vectors of every sample from which statistics come: all, with a projection a pair."""
        if self.loss.projector == "shared" and self.kind == "grid":
            return kept_positions(grid_map(feature, spec), None)
        if self.loss.projector == "shared" and self.kind == "mean":
            return [[row] for row in sample_means(feature, self.masks[1])]
        return kept_positions(feature, self.masks[1])

    def run(self):
        weights, errors = self.weights(), self.errors()
        samples, students, teachers = errors.shape
        total = 0.0
        for i, s, t in np.ndindex(samples, students, teachers):
            total += float(weights[i, s, t] * errors[i, s, t])
        total /= samples * (1 if self.loss.association.name == "last" else students)
        if self.loss.association.name == "learned":
            total += TEMPERATURE * special.rel_entr(weights, np.full(teachers, 1 / teachers)).sum(-1).mean()
        return total, weights, errors

    def errors(self):
        out = np.zeros((len(self.student[0]), len(self.student), len(self.targets)))
        for s, t in itertools.product(range(out.shape[1]), range(out.shape[2])):
            for i, (mine, theirs) in enumerate(zip(*self.aligned(s, t), strict=True)):
                squares = [float(((a - b) ** 2).mean().detach()) for a, b in zip(mine, theirs, strict=True)]
                out[i, s, t] = sum(squares) / len(squares)
        return out

    def aligned(self, s, t):
        """Return the projected and the target position vectors of every sample."""
        if self.kind == "grid":
            left, right = grid_map(self.student[s], self.specs[0][s]), grid_map(self.targets[t], self.specs[1][t])
            size = tuple(min(a, b) for a, b in zip(left.shape[2:], right.shape[2:], strict=True))
            return self.project_grid(s, t, pool(left, size)), kept_positions(pool(right, size), None)
        if self.kind == "mean":
            left, right = sample_means(self.student[s], self.masks[0]), sample_means(self.targets[t], self.masks[1])
            return self.project_rows(s, t, [[row] for row in left]), [[row] for row in right]
        rows = kept_positions(self.student[s], self.masks[0])
        return self.project_rows(s, t, rows), kept_positions(self.targets[t], self.masks[1])

    def project_grid(self, s, t, maps):
        if self.loss.projector == "pairwise":
            return kept_positions(project_map(maps, self.loss.projection[s][t]), None)
        return self.project_rows(s, t, kept_positions(maps, None))

    def project_rows(self, s, t, samples):
        flat = torch.stack([row for rows in samples for row in rows])
        if self.loss.projector == "shared":
            linear = self.loss.projection[s][str(self.targets[t].shape[1 if self.targets[t].dim() == 4 else 2])]
            flat = flat @ linear.weight.T + linear.bias
        else:
            flat = project_map(flat[:, :, None, None], self.loss.projection[s][t])[:, :, 0, 0]
        parts = flat.detach().split([len(rows) for rows in samples])
        return [list(part) for part in parts]

    def weights(self):
        size, students, teachers = len(self.student[0]), len(self.student), len(self.targets)
        if self.loss.association.name == "similarity":
            return self.similarity_weights()
        if self.loss.association.name == "learned":
            return self.learned_weights()
        fixed = np.zeros((students, teachers))
        if self.loss.association.name == "uniform":
            fixed[:] = 1 / teachers
        elif self.loss.association.name == "last":
            fixed[-1, -1] = 1
        else:  # two student layers in every scenario
            fixed[0, {2: 0, 3: 1}[teachers]] = fixed[1, teachers - 1] = 1
        return np.broadcast_to(fixed, (size, students, teachers))

    def similarity_weights(self):
        def cosines(feature, spec, mask):
            if feature.dim() == 4 or getattr(spec, "grid", None):
                maps = grid_map(feature, spec)
                rows = pool(maps, tuple(min(4, side) for side in maps.shape[2:])).flatten(1).numpy()
            else:
                rows = sample_means(feature, mask).numpy()
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            return rows @ rows.T

        left = [cosines(x, spec, self.masks[0]) for x, spec in zip(self.student, self.specs[0], strict=True)]
        right = [cosines(x, spec, self.masks[1]) for x, spec in zip(self.raw, self.specs[1], strict=True)]
        alike = np.zeros((len(self.student[0]), len(left), len(right)))
        for i, s, t in np.ndindex(alike.shape):
            alike[i, s, t] = np.corrcoef(left[s][i], right[t][i])[0, 1]
        return special.softmax(alike / TEMPERATURE, axis=2)

    def learned_weights(self):
        def embed(rows, net):
            rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            return two_layers(rows, net[1], net[3])

        queries = [
            embed(sample_means(x, self.masks[0]), n) for x, n in zip(self.student, self.loss.query, strict=True)
        ]
        keys = [embed(sample_means(x, self.masks[1]), n) for x, n in zip(self.targets, self.loss.key, strict=True)]
        cosines = torch.stack([torch.stack([(q * k).sum(1) for k in keys], 1) for q in queries], 1)
        return softmax(math.exp(0.6) * cosines).detach().numpy()


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("association", ASSOCIATIONS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_calibrated_is_the_naive_sum_over_samples_layers_and_positions(scenario, association, projector):
    loss, student, teacher = problem(scenario, association, projector)
    out = loss(student, teacher, *masks_of(scenario))
    total, weights, errors = CalibratedOracle(loss, scenario, student, teacher).run()
    assert relative(out.association, weights.copy()) < 1e-7
    assert relative(out.errors, errors) < 1e-9
    assert relative(out.total, total) < 1e-7
    assert torch.equal(out.total, out.per_sample.mean())


def naive_total(loss, student, teacher, masks):
    """Compute the loss from its own attention and targets, as the differentiable sum of squares (shared, tokens)."""
    out = loss(student, teacher, *masks)
    targets = [entry(feature) for entry, feature in zip(loss.statistics, teacher, strict=True)]
    total = 0
    for s, t in itertools.product(range(len(student)), range(len(targets))):
        linear = loss.projection[s][str(targets[t].shape[2])]
        squares = ((student[s] @ linear.weight.T + linear.bias - targets[t]) ** 2).mean(2)
        error = (squares * masks[0]).sum(1) / masks[0].sum(1)
        total = total + (out.association[:, s, t] * error).mean() / len(student)
    return total


def test_calibrated_gradients_of_features_and_projections_are_those_of_the_plain_squares():
    loss, student, teacher = problem("text")
    loss(student, teacher, *masks_of("text"))
    loss.eval()
    student = [feature.requires_grad_() for feature in student]
    wanted = [*student, *loss.projection.parameters()]
    actual = torch.autograd.grad(loss(student, teacher, *masks_of("text")).total, wanted)
    expected = torch.autograd.grad(naive_total(loss, student, teacher, masks_of("text")), wanted)
    assert all(relative(left, right) < 1e-10 for left, right in zip(actual, expected, strict=True))


def every_gradient(loss, student, teacher, masks):
    student = [feature.clone().requires_grad_() for feature in student]
    out = loss(student, teacher, *masks)
    parameters = [entry for entry in loss.parameters() if entry.requires_grad]
    gradients = torch.autograd.grad(out.total, [*student, *parameters], allow_unused=True)
    filled = [torch.zeros(()) if entry is None else entry for entry in gradients]
    return out, filled[: len(student)], filled[len(student) :]


@pytest.mark.parametrize("filling", [7.0, float("nan")])
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("association", ASSOCIATIONS)
@pytest.mark.parametrize("scenario", ["text", "other tokenization"])
def test_wider_padding_changes_neither_loss_nor_gradients(scenario, association, projector, filling):
    loss, student, teacher = problem(scenario, association, projector)
    wide = copy.deepcopy(loss)

    def pad(feature, value):
        return torch.cat([feature, torch.full_like(feature, value)], 1)

    masks = masks_of(scenario)
    wider = [pad(mask, 0) for mask in masks]
    out, features, parameters = every_gradient(loss, student, teacher, masks)
    padded = [pad(feature, 5.0) for feature in student], [pad(feature, filling) for feature in teacher]
    other, other_features, other_parameters = every_gradient(wide, *padded, wider)
    torch.testing.assert_close(other.per_sample, out.per_sample, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(other.association, out.association, rtol=1e-9, atol=1e-12)
    for left, right in zip(other_features, features, strict=True):
        if right.dim():  # the `last` association leaves all student layers but one without gradient
            torch.testing.assert_close(left[:, :6], right, rtol=1e-8, atol=1e-12)
            assert left[:, 6:].abs().max() == 0
    for left, right in zip(other_parameters, parameters, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-11)


def test_a_vector_layer_beside_token_layers_is_not_masked():
    torch.manual_seed(0)
    vector = FeatureSpec("pooler", "tokens", 4, 1)
    for projector in PROJECTORS:
        loss = SemCKDLoss([(6, 4), vector], [(6, 5), vector], projector=projector, association="uniform").double()
        student = [normal(8, 6, 4, seed=1), normal(8, 4, seed=2)]
        teacher = [normal(8, 6, 5, seed=3), normal(8, 4, seed=4)]
        other = copy.deepcopy(loss)
        out, bare = loss(student, teacher, MASK, MASK), other(student, teacher)
        torch.testing.assert_close(out.errors[:, 1, 1], bare.errors[:, 1, 1], rtol=1e-10, atol=0)


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("association", ASSOCIATIONS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_calibrated_loss_does_not_depend_on_the_order_of_the_batch(scenario, association, projector):
    loss, student, teacher = problem(scenario, association, projector)
    other, order = copy.deepcopy(loss), torch.randperm(8, generator=torch.Generator().manual_seed(3))
    masks = masks_of(scenario)
    out = loss(student, teacher, *masks)
    permuted_masks = [mask if mask is None else mask[order] for mask in masks]
    permuted = other([feature[order] for feature in student], [feature[order] for feature in teacher], *permuted_masks)
    torch.testing.assert_close(permuted.total, out.total, rtol=1e-11, atol=0)
    torch.testing.assert_close(permuted.association, out.association[order], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(permuted.errors, out.errors[order], rtol=1e-9, atol=1e-12)


def test_published_loss_does_depend_on_the_order_of_the_batch():
    loss, student, teacher = published_problem("student larger")
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    out = loss(student, teacher)
    permuted = loss([feature[order] for feature in student], [feature[order] for feature in teacher])
    assert (permuted.association - out.association[order]).abs().max() > 0.01
    assert relative(permuted.total, out.total) > 1e-4
    torch.testing.assert_close(permuted.errors, out.errors[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("association", ASSOCIATIONS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_batch_of_one_trains(scenario, association, projector):
    loss, student, teacher = problem(scenario, association, projector)
    masks = [mask if mask is None else mask[1:2] for mask in masks_of(scenario)]
    out, features, parameters = every_gradient(loss, [x[:1] for x in student], [x[:1] for x in teacher], masks)
    assert out.per_sample.shape == (1,) and out.total.isfinite()
    assert all(entry.isfinite().all() for entry in [*features, *parameters])
    if association == "similarity":
        np.testing.assert_allclose(out.association, 1 / len(teacher), rtol=1e-12)


def test_the_teacher_gets_no_gradient_and_reported_tensors_carry_none():
    for loss, student, teacher in (problem("maps", "learned", "pairwise"), published_problem("equal")):
        teacher = [feature.requires_grad_() for feature in teacher]
        out = loss(student, teacher)
        out.total.backward()
        assert all(feature.grad is None for feature in teacher)
        assert not out.association.requires_grad and not out.errors.requires_grad and out.per_sample.requires_grad


@pytest.mark.parametrize("association", ASSOCIATIONS)
def test_every_trained_parameter_gets_a_gradient_where_its_pair_takes_part(association):
    loss, student, teacher = problem("maps", association, "shared")
    loss(student, teacher).total.backward()
    silent = {name for name, entry in loss.named_parameters() if entry.grad is None or not entry.grad.any()}
    idle = {"last": 6, "one_to_one": 4}.get(association, 0)
    assert len(silent) == idle, silent


# Statistics


def test_evaluation_neither_observes_nor_changes_statistics():
    loss, student, teacher = problem("maps")
    loss(student, teacher)
    loss.eval()
    before = copy.deepcopy(loss.state_dict())
    first, second = loss(student, teacher).total, loss(student, teacher).total
    loss.synchronize()
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


def test_statistics_that_are_not_collected_are_used_as_they_are_in_training():
    loss, student, teacher = problem("maps")
    loss(student, teacher)
    before = copy.deepcopy(loss.state_dict())
    loss.collecting = False
    loss(student, [feature * 10 for feature in teacher])
    loss.synchronize()
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


def test_statistics_are_needed_until_the_first_synchronization():
    loss, _, teacher = problem("maps")
    assert loss.needs_statistics
    loss.update_statistics(teacher)
    assert loss.needs_statistics
    loss.synchronize()
    assert not loss.needs_statistics
    assert not problem("maps", target_norm="none")[0].needs_statistics


def test_statistics_of_two_processes_are_summed_in_one_reduction():
    loss, _, teacher = problem("text")
    other, whole, calls = copy.deepcopy(loss), copy.deepcopy(loss), []
    loss.update_statistics([x[:3] for x in teacher], MASK[:3])
    other.update_statistics([x[3:] for x in teacher], MASK[3:])
    whole.update_statistics(teacher, MASK)
    theirs = torch.cat([entry.pending() for entry in other.statistics])

    def reduce_sum(sums):
        calls.append(sums.shape)
        return sums + theirs

    loss.synchronize(reduce_sum)
    whole.synchronize()
    assert calls == [theirs.shape]
    for left, right in zip(loss.statistics, whole.statistics, strict=True):
        torch.testing.assert_close(left.mean, right.mean, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(left.variance, right.variance, rtol=1e-12, atol=1e-13)


def test_raw_targets_are_used_as_they_are():
    loss, student, teacher = problem("text", "uniform", target_norm="none")
    out = loss(student, teacher, MASK, MASK)
    linear = loss.projection[0]["6"]
    squares = ((student[0] @ linear.weight.T + linear.bias - teacher[0]) ** 2).mean(2)
    assert relative(out.errors[:, 0, 0], (squares * MASK).sum(1) / MASK.sum(1)) < 1e-12


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("association", ASSOCIATIONS)
@pytest.mark.parametrize("target_norm", ["channel", "none"])
def test_half_precision_features_with_outliers_give_the_float32_loss(target_norm, association, projector, dtype):
    loss, student, teacher = problem("text", association, projector, target_norm=target_norm, batch_size=8)
    loss = loss.float()
    teacher = [feature + torch.tensor([900.0] + [0.0] * (feature.shape[2] - 1)) for feature in teacher]
    narrow = [x.to(dtype) for x in student], [x.to(dtype) for x in teacher]
    wide = [x.float() for x in narrow[0]], [x.float() for x in narrow[1]]
    expected = copy.deepcopy(loss)(*wide, MASK, MASK)
    out = loss(*narrow, MASK, MASK)
    assert out.total.dtype == torch.float32
    assert relative(out.per_sample.detach(), expected.per_sample.detach()) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_published_survives_autocast_on_maps_whose_similarity_overflows(dtype):
    torch.manual_seed(0)
    loss = SemCKDLoss.published([(4, 16, 16)], [(6, 16, 16), (6, 8, 8)], 8)
    student = [normal(8, 4, 16, 16, dtype=torch.float32) * 30]
    teacher = [normal(8, 6, 16, 16, seed=1, dtype=torch.float32) * 300, normal(8, 6, 8, 8, dtype=torch.float32) * 300]
    expected = copy.deepcopy(loss)(student, teacher)
    with torch.autocast("cpu", dtype=dtype):
        out = loss(student, teacher)
    torch.testing.assert_close(out.association, expected.association, rtol=1e-4, atol=1e-5)
    assert relative(out.total.detach(), expected.total.detach()) < 2e-2


@pytest.mark.parametrize("association", ASSOCIATIONS)
@pytest.mark.parametrize("projector", PROJECTORS)
def test_autocast_changes_the_calibrated_loss_by_rounding_only(association, projector):
    loss, student, teacher = problem("maps", association, projector)
    loss, student, teacher = loss.float(), [x.float() for x in student], [x.float() for x in teacher]
    expected = copy.deepcopy(loss)(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = loss(student, teacher)
    out.total.backward()
    assert out.total.dtype == torch.float32
    assert relative(out.total.detach(), expected.total.detach()) < 2e-2
    assert all(entry.grad is None or entry.grad.isfinite().all() for entry in loss.parameters())


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("target_norm", ["channel", "none"])
@pytest.mark.parametrize("association", ASSOCIATIONS)
def test_a_loss_cast_to_bfloat16_takes_float32_features(association, target_norm, projector):
    loss, student, teacher = problem("maps", association, projector, target_norm=target_norm, batch_size=8)
    out = loss.bfloat16()([x.float() for x in student], [x.float() for x in teacher])
    out.total.backward()
    assert out.total.dtype == torch.float32 and out.total.isfinite()


# Building


@pytest.mark.parametrize(("student", "teacher"), [(1, 3), (2, 2), (3, 3), (2, 4)])
def test_another_number_of_features_than_layers_is_refused(student, teacher):
    loss, mine, theirs = problem("maps")
    mine, theirs = (mine * 2)[:student], (theirs * 2)[:teacher]
    with pytest.raises(InputError, match=rf"(?s){student} student and {teacher} teacher features.*2 and 3"):
        loss(mine, theirs)


@pytest.mark.parametrize(
    ("students", "teachers", "role"), [([], [(3, 2, 2)], "student"), ([(3, 2, 2)], [], "teacher")]
)
def test_no_layers_are_refused(students, teachers, role):
    with pytest.raises(InputError, match=f"There is no {role} layer"):
        SemCKDLoss(students, teachers)


@pytest.mark.parametrize("size", [None, 0, -8])
def test_the_published_association_asks_for_the_batch_size(size):
    with pytest.raises(ConfigurationError, match="needs the batch size"):
        SemCKDLoss([(3, 2, 2)], [(3, 2, 2)], association="learned", target_norm="none", batch_size=size)


def test_shared_projections_are_one_a_student_layer_and_teacher_width():
    loss, _, _ = problem("maps")
    assert [sorted(row) for row in loss.projection] == [["3", "6"], ["3", "6"]]
    shapes = [tuple(row[width].weight.shape) for row in loss.projection for width in ("3", "6")]
    assert shapes == [(3, 4), (6, 4), (3, 5), (6, 5)]


@pytest.mark.parametrize("association", ASSOCIATIONS)
def test_the_bound_of_the_weights_is_known_where_there_is_one(association):
    bound = problem("maps", association)[0].upper_bound
    expected = {"learned": 1.0}.get(association)
    assert bound == (None if expected is None else pytest.approx(expected))
    assert problem("maps", association)[0].required_batch_size is None


def test_a_configuration_builds_the_loss_that_it_describes(tmp_path):
    specs = [FeatureSpec.from_shape((4, 4, 4), "1")], [FeatureSpec.from_shape((6, 2, 2), "1")] * 2
    basics = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    given = {"association": "uniform", "association_temperature": 0.7, "projector": "shared"}
    loss = SemCKDLoss.for_layers(*specs, loss_options(SemCKDConfig(**basics, **given)))
    assert (loss.association.name, loss.projector, len(loss.statistics), loss.association.temperature) == (
        "uniform",
        "shared",
        2,
        0.7,
    )
    published = SemCKDLoss.for_layers(
        *specs, loss_options(SemCKDConfig.published(**basics, per_device_train_batch_size=12))
    )
    reference = SemCKDLoss.published([(4, 4, 4)], [(6, 2, 2)] * 2, 12)
    shapes = [{name: value.shape for name, value in entry.state_dict().items()} for entry in (published, reference)]
    assert shapes[0] == shapes[1] and published.required_batch_size == 12 and published.association.temperature == 1.0


@pytest.mark.parametrize("association", ASSOCIATIONS)
def test_state_dict_round_trip_gives_the_same_loss(association):
    loss, student, teacher = problem("maps", association, "pairwise")
    loss(student, teacher)
    torch.manual_seed(99)
    restored = SemCKDLoss(
        *SCENARIOS["maps"][:2], association=association, projector="pairwise", association_temperature=TEMPERATURE
    ).double()
    restored.load_state_dict(loss.state_dict())
    assert torch.equal(restored.eval()(student, teacher).total, loss.eval()(student, teacher).total)


# (d) The planted problem: one teacher layer knows the input, at a large scale; two are small noise

NOISE, SIGNAL, SMALL_NOISE = range(3)
PLANTED = [(8, 2, 2)] * 2, [(6, 2, 2)] * 3
WINDOW = 30


class TwoLayerStudent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 32), nn.Linear(32, 32)

    def forward(self, x):
        first = self.first(x)
        return [first.view(-1, 8, 2, 2), self.second(first.relu()).view(-1, 8, 2, 2)]


def train_on_planted_problem(build, seed, steps=150):
    """Train student and loss; return mean weights (S, T), mean errors (S, T) and mean entropy of the last steps."""
    torch.manual_seed(seed)
    mixing = torch.randn(12, 24) / 12**0.5
    loss, student = build(), TwoLayerStudent()
    optimizer = torch.optim.Adam([*student.parameters(), *loss.parameters()], lr=0.01, fused=True)
    window = []
    for step in range(steps):
        x = torch.randn(32, 12)
        signal = 8 * torch.tanh(x @ mixing).view(32, 6, 2, 2)
        out = loss(student(x), [0.3 * torch.randn(32, 6, 2, 2), signal, 0.1 * torch.randn(32, 6, 2, 2)])
        optimizer.zero_grad()
        out.total.backward()
        optimizer.step()
        if step >= steps - WINDOW:
            window.append((out.association.mean(0), out.errors.mean(0)))
    assert 4 < signal.std() < 6
    weights, errors = (torch.stack(entries).mean(0) for entries in zip(*window, strict=True))
    return weights.double().numpy(), errors.double().numpy()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_published_weights_leave_the_signal_for_the_layer_of_smallest_variance(seed):
    weights, errors = train_on_planted_problem(lambda: SemCKDLoss.published(*PLANTED, 32), seed)
    assert weights.argmax(1).tolist() == [SMALL_NOISE, SMALL_NOISE] == errors.argmin(1).tolist()
    floor = 1 / (1 + 2 * math.exp(2))
    assert (weights[:, SIGNAL] < 1.1 * floor).all()


@pytest.mark.parametrize("temperature", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_calibrated_learned_weights_find_the_signal_and_settle_at_the_gibbs_distribution(seed, temperature):
    weights, errors = train_on_planted_problem(
        lambda: SemCKDLoss(*PLANTED, association="learned", association_temperature=temperature), seed
    )
    assert weights.argmax(1).tolist() == [SIGNAL, SIGNAL]
    np.testing.assert_allclose(weights, special.softmax(-errors / temperature, axis=1), atol=0.03)
    least = np.exp(-np.ptp(errors, axis=1) / temperature) / 3
    assert (weights.min(1) >= least).all()
    bound = special.entr(1 - 2 * least) + 2 * special.entr(least)
    assert (special.entr(weights).sum(1) >= bound).all() and (bound > 0).all()


# (e) Accumulation


def prepared(scenario, association):
    """Return a loss whose statistics hold what a trainer would have merged before the step."""
    loss, student, teacher = problem(scenario, association)
    loss.automatic_synchronization = False
    loss.update_statistics(features_of(SCENARIOS[scenario][1], 300, scale=2.0), masks_of(scenario)[1])
    loss.synchronize()
    return loss, student, teacher


def part(tensors, piece):
    return [tensor if tensor is None else tensor[piece] for tensor in tensors]


def accumulate(loss, student, teacher, masks, parts):
    """Return gradients of micro-batches whose per-sample losses are divided by the size of the whole batch."""
    student = [feature.clone().requires_grad_() for feature in student]
    start = 0
    for size in parts:
        piece = slice(start, start + size)
        out = loss(part(student, piece), part(teacher, piece), *part(masks, piece))
        (out.per_sample.sum() / sum(parts)).backward()
        start += size
    entries = [*student, *loss.parameters()]
    return [torch.zeros_like(entry) if entry.grad is None else entry.grad for entry in entries]


@pytest.mark.parametrize("parts", [[4, 4], [3, 5], [1] * 8])
@pytest.mark.parametrize("association", ["learned", "uniform", "last", "one_to_one"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_accumulated_micro_batches_give_the_gradients_of_the_whole_batch(scenario, association, parts):
    loss, student, teacher = prepared(scenario, association)
    other, masks = copy.deepcopy(loss), masks_of(scenario)
    whole = accumulate(loss, student, teacher, masks, [8])
    cut = accumulate(other, student, teacher, masks, parts)
    scale = max(float(entry.norm()) for entry in whole)
    for left, right in zip(cut, whole, strict=True):
        assert float((left - right).norm()) <= 1e-9 * max(float(right.norm()), 1e-6 * scale)
    loss.synchronize(), other.synchronize()
    for left, right in zip(loss.statistics, other.statistics, strict=True):
        torch.testing.assert_close(left.mean, right.mean, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(left.variance, right.variance, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_similarity_is_defined_on_the_micro_batch_and_the_same_for_the_same_micro_batches(scenario):
    loss, student, teacher = prepared(scenario, "similarity")
    other, masks = copy.deepcopy(loss), masks_of(scenario)
    accumulated = accumulate(loss, student, teacher, masks, [4, 4])
    halves = [
        accumulate(copy.deepcopy(other), *(part(entries, piece) for entries in (student, teacher, masks)), [4])
        for piece in (slice(0, 4), slice(4, 8))
    ]
    layers = len(student)
    for n, entry in enumerate(accumulated):
        first, second = halves[0][n], halves[1][n]
        expected = torch.cat([first, second]) / 2 if n < layers else (first + second) / 2
        torch.testing.assert_close(entry, expected, rtol=1e-9, atol=1e-13)


# (f) A few of the tokens, and maps of a limited size

PHASE = torch.tensor([0.0, 0.3, 0.99, 0.5, 0.75, 0.125, 0.9, 0.62])
TOKENS = 3


def chosen_ranks(count, limit, phase):
    chosen = min(count, limit)
    return [math.floor((k + Fraction(phase)) * count / chosen) for k in range(chosen)]


class SampledOracle(CalibratedOracle):
    """The calibrated form at chosen tokens and on small maps, one sample and one token at a time."""

    def __init__(self, loss, scenario, student, teacher, tokens, limit):
        self.tokens, self.limit = tokens, limit
        super().__init__(loss, scenario, student, teacher)

    def chosen(self, rows):
        """Return the chosen ones of each sample's tokens: their ranks are floor((k + phase) * n / chosen)."""
        return [
            [tokens[rank] for rank in chosen_ranks(len(tokens), self.tokens, phase)]
            for phase, tokens in zip(PHASE.tolist(), rows, strict=True)
        ]

    def limited(self, feature, spec):
        maps = grid_map(feature, spec)
        return pool(maps, tuple(min(self.limit, side) for side in maps.shape[2:]))

    def compared(self, feature, spec):
        if self.kind == "grid":
            return kept_positions(self.limited(feature, spec), None)
        return super().compared(feature, spec) if self.kind == "mean" else self.chosen(self.rows(feature))

    def rows(self, feature):
        return kept_positions(feature, self.masks[1])

    def aligned(self, s, t):
        if self.kind == "mean":
            return super().aligned(s, t)
        if self.kind == "grid":
            left = self.limited(self.student[s], self.specs[0][s])
            right = self.limited(self.targets[t], self.specs[1][t])
            size = tuple(min(a, b) for a, b in zip(left.shape[2:], right.shape[2:], strict=True))
            return self.project_grid(s, t, pool(left, size)), kept_positions(pool(right, size), None)
        mine, theirs = self.chosen(self.rows(self.student[s])), self.chosen(self.rows(self.targets[t]))
        return self.project_rows(s, t, mine), theirs


# Scenario, tokens, side of maps: limits that cut nothing, something and nearly everything. At 4 the maps that are
# compared are also those that similarities are taken on.
LIMITED = [
    ("maps", TOKENS, 1),
    ("maps", TOKENS, 3),
    ("maps", TOKENS, 4),
    ("cnn to vit", TOKENS, 2),
    ("vit to cnn", TOKENS, 2),
    ("text", 1, 4),
    ("text", TOKENS, 4),
    ("text", 6, 4),
    ("other tokenization", TOKENS, 4),
    ("vit to vit", TOKENS, 4),
]


@pytest.mark.parametrize("association", ASSOCIATIONS)
@pytest.mark.parametrize(("scenario", "tokens", "limit"), LIMITED)
def test_a_few_tokens_and_small_maps_are_the_naive_sum_over_what_is_left(scenario, association, tokens, limit):
    loss, student, teacher = problem(scenario, association, max_tokens=tokens, max_grid=limit)
    masks = masks_of(scenario)
    out = loss(student, loss.select(teacher, masks[1], PHASE), *masks)
    total, weights, errors = SampledOracle(loss, scenario, student, teacher, tokens, limit).run()
    assert relative(out.association, weights.copy()) < 1e-7
    assert relative(out.errors, errors) < 1e-9
    assert relative(out.total, total) < 1e-7


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_few_tokens_and_small_maps_change_the_loss(scenario):
    whole, student, teacher = problem(scenario, "uniform")
    less = problem(scenario, "uniform", max_tokens=TOKENS, max_grid=2)[0]
    masks = masks_of(scenario)
    pair = [entry(student, entry.select(teacher, masks[1], PHASE), *masks).total for entry in (whole, less)]
    changed = relative(pair[1], pair[0]) > 1e-4
    assert changed == (scenario != "other tokenization"), "means are over all tokens, whatever the limit"


def test_gradients_of_a_few_tokens_are_those_of_the_plain_squares():
    loss, student, teacher = problem("text", max_tokens=TOKENS)
    targets = loss.select(teacher, MASK, PHASE)
    loss(student, targets, MASK, MASK)
    loss.eval()
    student = [feature.requires_grad_() for feature in student]
    wanted = [*student, *loss.projection.parameters()]
    out = loss(student, targets, MASK, MASK)
    actual = torch.autograd.grad(out.total, wanted)
    total = 0
    for i, s, t in itertools.product(range(8), range(2), range(3)):
        tokens = [n for n in range(6) if MASK[i, n]]
        places = [tokens[rank] for rank in chosen_ranks(len(tokens), TOKENS, float(PHASE[i]))]
        linear = loss.projection[s][str(teacher[t].shape[2])]
        target = loss.statistics[t](teacher[t])[i, places]
        squares = (student[s][i, places] @ linear.weight.T + linear.bias - target) ** 2
        total = total + out.association[i, s, t] * squares.mean() / 16
    expected = torch.autograd.grad(total, wanted)
    assert all(relative(left, right) < 1e-10 for left, right in zip(actual, expected, strict=True))
    untouched = (actual[0].abs().sum(2) == 0) & (MASK == 1)
    assert untouched.any(), "with all tokens compared, nothing would be tested"


def sampled_gradients(loss, student, teacher, masks, phase):
    """Return the output and the gradients of features and parameters, at the tokens that a phase chooses."""
    return every_gradient(loss, student, loss.select(teacher, masks[1], phase), masks)


@pytest.mark.parametrize("filling", [7.0, float("nan")])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("association", ASSOCIATIONS)
@pytest.mark.parametrize("scenario", ["text", "other tokenization"])
def test_longer_padding_of_sampled_tokens_changes_neither_loss_nor_gradients(scenario, association, side, filling):
    loss, student, teacher = problem(scenario, association, max_tokens=TOKENS)
    wide, masks = copy.deepcopy(loss), masks_of(scenario)

    def pad(feature, value):
        parts = [feature, torch.full_like(feature[:, :5], value)]
        return torch.cat(parts if side == "right" else parts[::-1], 1)

    for feature in teacher:
        feature[masks[1] == 0] = filling
    out, features, parameters = sampled_gradients(loss, student, teacher, masks, PHASE)
    padded = [pad(feature, 5.0) for feature in student], [pad(feature, filling) for feature in teacher]
    other, other_features, other_parameters = sampled_gradients(wide, *padded, [pad(mask, 0) for mask in masks], PHASE)
    assert out.total.isfinite()
    torch.testing.assert_close(other.per_sample, out.per_sample, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(other.errors, out.errors, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(other.association, out.association, rtol=1e-9, atol=1e-12)
    own, added = (slice(0, 6), slice(6, None)) if side == "right" else (slice(5, None), slice(0, 5))
    for left, right in zip(other_features, features, strict=True):
        if right.dim():  # the `last` association leaves all student layers but one without gradient
            torch.testing.assert_close(left[:, own], right, rtol=1e-8, atol=1e-12)
            assert left[:, added].abs().max() == 0
    for left, right in zip(other_parameters, parameters, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("association", ASSOCIATIONS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_sampled_loss_and_its_gradients_follow_a_permutation_of_the_batch(scenario, association):
    loss, student, teacher = problem(scenario, association, max_tokens=TOKENS, max_grid=2)
    other, masks = copy.deepcopy(loss), masks_of(scenario)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    out, features, parameters = sampled_gradients(loss, student, teacher, masks, PHASE)
    permuted = part(student, order), part(teacher, order), part(masks, order), PHASE[order]
    moved, moved_features, moved_parameters = sampled_gradients(other, *permuted)
    torch.testing.assert_close(moved.per_sample, out.per_sample[order], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(moved.errors, out.errors[order], rtol=1e-9, atol=1e-12)
    for left, right in zip(moved_features, features, strict=True):
        torch.testing.assert_close(left, right[order] if right.dim() else right, rtol=1e-8, atol=1e-12)
    for left, right in zip(moved_parameters, parameters, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("association", ["learned", "uniform", "last", "one_to_one"])
@pytest.mark.parametrize("scenario", ["text", "vit to vit"])
def test_micro_batches_of_sampled_tokens_add_up_to_the_whole_batch(scenario, association):
    loss, student, teacher = problem(scenario, association, max_tokens=TOKENS)
    loss.automatic_synchronization, masks = False, masks_of(scenario)
    other = copy.deepcopy(loss)
    out = loss(student, loss.select(teacher, masks[1], PHASE), *masks)
    cut = []
    for piece in (slice(0, 3), slice(3, 8)):
        theirs = other.select(part(teacher, piece), *part([masks[1], PHASE], piece))
        cut.append(other(part(student, piece), theirs, *part(masks, piece)).per_sample)
    torch.testing.assert_close(torch.cat(cut), out.per_sample, rtol=1e-10, atol=1e-12)
    loss.synchronize(), other.synchronize()
    for left, right in zip(loss.statistics, other.statistics, strict=True):
        torch.testing.assert_close(left.variance, right.variance, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("association", "projector", "target_norm"),
    [
        *[(association, "shared", "channel") for association in ASSOCIATIONS],
        ("learned", "shared", "none"),
        ("uniform", "shared", "none"),
        ("similarity", "pairwise", "channel"),
        ("learned", "pairwise", "channel"),
        ("learned", "pairwise", "none"),
    ],
)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_selected_features_give_what_the_features_give(scenario, association, projector, target_norm):
    options = {"target_norm": target_norm, "batch_size": 8, "max_tokens": TOKENS, "max_grid": 2}
    loss, student, teacher = problem(scenario, association, projector, **options)
    other, masks = copy.deepcopy(loss), masks_of(scenario)
    selected = other.select(teacher, masks[1])
    assert other.targets(selected) is selected and other.targets(selected, masks[1]) is selected
    out, features, parameters = every_gradient(loss, student, teacher, masks)
    # The mask of the teacher's tokens went into the selection.
    again, other_features, other_parameters = every_gradient(other, student, selected, [masks[0], None])
    for name in ("total", "per_sample", "association", "errors"):
        assert torch.equal(getattr(again, name), getattr(out, name))
    for left, right in zip([*other_features, *other_parameters], [*features, *parameters], strict=True):
        assert torch.equal(left, right)
    states = loss.state_dict(), other.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_pairwise_projector_takes_all_tokens_and_whole_maps():
    for scenario in ("text", "maps"):
        loss, student, teacher = problem(scenario, "uniform", "pairwise", max_tokens=TOKENS, max_grid=1)
        whole = problem(scenario, "uniform", "pairwise")[0]
        masks = masks_of(scenario)
        assert not loss.samples_tokens
        targets = loss.select(teacher, masks[1], PHASE)
        assert torch.equal(loss(student, targets, *masks).total, whole(student, teacher, *masks).total)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_statistics_are_those_of_what_is_compared(scenario):
    loss, student, teacher = problem(scenario, "uniform", max_tokens=TOKENS, max_grid=2)
    masks = masks_of(scenario)
    loss.update_statistics(loss.select(teacher, masks[1], PHASE))
    loss.synchronize()
    oracle = SampledOracle(loss, scenario, student, teacher, TOKENS, 2)
    for entry, feature, spec in zip(loss.statistics, teacher, SCENARIOS[scenario][1], strict=True):
        values = torch.stack([row for rows in oracle.compared(feature, spec) for row in rows]).numpy()
        assert float(entry.count) == len(values)
        np.testing.assert_allclose(entry.mean, values.mean(0), rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(entry.variance, values.var(0), rtol=1e-10)


def test_the_mean_loss_over_phases_is_that_of_all_tokens():
    whole, student, teacher = problem("text", "uniform")
    whole(student, teacher, MASK, MASK)
    less = problem("text", "uniform", max_tokens=TOKENS)[0]
    less.load_state_dict(whole.state_dict())
    whole.eval(), less.eval()
    expected, phases = whole(student, teacher, MASK, MASK).errors, 60
    total = torch.zeros_like(expected)
    for phase in range(phases):
        targets = less.select(teacher, MASK, torch.full((8,), (phase + 0.5) / phases))
        total += less(student, targets, MASK, MASK).errors / phases
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-12)


def test_a_sample_without_any_token_gives_no_error_and_disturbs_nobody():
    loss, student, teacher = problem("text", "uniform", target_norm="none", max_tokens=TOKENS)
    mask = MASK.clone()
    mask[4] = 0
    teacher[1][4] = float("nan")
    out, features, parameters = sampled_gradients(loss, student, teacher, [mask, mask], PHASE)
    assert out.errors[4].abs().max() == 0 and features[0][4].abs().max() == 0
    assert all(entry.isfinite().all() for entry in [out.total, *features, *parameters])
    others = [i for i in range(8) if i != 4]
    bare = loss(student, loss.select(teacher, MASK, PHASE), MASK, MASK)
    torch.testing.assert_close(out.errors[others], bare.errors[others], rtol=1e-12, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_vector_layer_beside_sampled_tokens_is_not_masked(side):
    torch.manual_seed(0)
    vector, mask = FeatureSpec("pooler", "tokens", 4, 1), MASK if side == "right" else MASK.flip(1)
    specs = [(6, 4), vector], [(6, 5), vector]
    loss = SemCKDLoss(*specs, association="uniform", target_norm="none", max_tokens=TOKENS).double()
    student = [normal(8, 6, 4, seed=1), normal(8, 4, seed=2)]
    teacher = [normal(8, 6, 5, seed=3), normal(8, 4, seed=4)]
    out, bare = loss(student, teacher, mask, mask), loss(student, teacher)
    torch.testing.assert_close(out.errors[:, 1, 1], bare.errors[:, 1, 1], rtol=1e-10, atol=0)


# (g) Neighboring layers that share their projections


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_shared_projections_give_what_equal_projections_of_their_own_give(scenario):
    def build(shared):
        students, teachers, _, _, aligned = SCENARIOS[scenario]
        torch.manual_seed(0)
        students = [students[0]] * 3 + [students[1]]
        loss = SemCKDLoss(students, teachers, tokens_aligned=aligned, layers_per_projection=shared)
        return loss.double(), features_of(students, 0), features_of(teachers, 60)

    (shared, student, teacher), (own, _, _) = build(2), build(1)
    masks = masks_of(scenario)
    widths = [feature.shape[1 if feature.dim() == 4 else 2] for feature in student]
    assert shared.comparison.projection_of == ([0, 0, 1, 1] if widths[2] == widths[3] else [0, 0, 1, 2])
    assert (
        own.comparison.projection_of == [0, 1, 2, 3]
        and len(shared.projection) == shared.comparison.projection_of[-1] + 1
    )
    for s, owner in enumerate(shared.comparison.projection_of):
        own.projection[s].load_state_dict(shared.projection[owner].state_dict())
    out, expected = shared(student, teacher, *masks), own(student, teacher, *masks)
    out.total.backward(), expected.total.backward()
    assert relative(out.total, expected.total) < 1e-12 and relative(out.errors, expected.errors) < 1e-12
    for owner, entry in enumerate(shared.projection):
        members = [own.projection[s] for s in range(4) if shared.comparison.projection_of[s] == owner]
        for name, parameter in entry.named_parameters():
            gradients = [member.get_parameter(name).grad for member in members]
            torch.testing.assert_close(parameter.grad, sum(gradients), rtol=1e-9, atol=1e-13)


def test_only_neighbors_of_one_width_share_a_projection():
    widths = [4, 4, 4, 6, 6, 4, 4, 4, 4]
    for shared, expected in [
        (1, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (2, [0, 0, 1, 2, 2, 3, 3, 4, 4]),
        (3, [0, 0, 0, 1, 1, 2, 2, 2, 3]),
        (100, [0, 0, 0, 1, 1, 2, 2, 2, 2]),
    ]:
        loss = SemCKDLoss([(6, width) for width in widths], [(6, 5)], layers_per_projection=shared)
        assert loss.comparison.projection_of == expected
        assert [loss.projection[n]["5"].in_features for n in loss.comparison.projection_of] == widths
    pairwise = SemCKDLoss([(6, 4)] * 3, [(6, 5)], projector="pairwise", layers_per_projection=3)
    assert pairwise.comparison.projection_of == [0, 1, 2] and len(pairwise.projection) == 3


def size_of_projections(students, teachers, shared):
    loss = SemCKDLoss(students, teachers, association="uniform", layers_per_projection=shared)
    return sum(entry.numel() for entry in loss.projection.parameters())


@pytest.mark.parametrize("seed", range(12))
def test_as_few_layers_share_a_projection_as_keep_them_under_a_fifth_of_the_student(seed):
    draw = np.random.default_rng(seed)
    students = [FeatureSpec.from_shape((6, 8 * int(draw.integers(1, 3))), str(s)) for s in range(draw.integers(1, 8))]
    teachers = [FeatureSpec.from_shape((6, 8 * int(draw.integers(1, 5))), str(t)) for t in range(draw.integers(1, 5))]
    sizes = [size_of_projections(students, teachers, shared) for shared in range(1, len(students) + 1)]
    for size in {*sizes, min(sizes) - 1}:
        for parameters in (5 * size, 5 * size + 1):
            small = [shared for shared, entry in enumerate(sizes, 1) if 5 * entry < parameters]
            expected = small[0] if small else len(students)
            assert layers_per_projection(students, teachers, parameters) == expected
    assert layers_per_projection(students, teachers, None) == 1


def maps_of(*shapes):
    return [FeatureSpec.from_shape(shape, str(shape)) for shape in shapes]


def patches(width, layers):
    return [FeatureSpec("block", "tokens", width, 197, (14, 14), 1)] * layers


RESNET = maps_of((64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7))
NARROW = maps_of((32, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8))
BERT = [FeatureSpec.from_shape((128, 768), "layer")] * 12

# Student layers, teacher layers, parameters of the student, how many layers share.
PAIRS = {
    "BERT-base to 6x384": ([FeatureSpec.from_shape((128, 384), "layer")] * 6, BERT, 23e6, 1),
    "BERT-base to 4x312": ([FeatureSpec.from_shape((128, 312), "layer")] * 4, BERT, 14e6, 1),
    "ViT-B to 12x192": (patches(192, 12), patches(768, 12), 5.5e6, 2),
    "ResNet-34 to 18": (RESNET, RESNET, 11.7e6, 1),
    "resnet32x4 to 8x4": (NARROW, NARROW, 1.2e6, 1),
    "resnet32x4 to 8x4, stages": (NARROW[1:], NARROW[1:], 1.2e6, 1),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_projections_stay_under_a_fifth_of_ordinary_students(pair, tmp_path):
    students, teachers, parameters, shared = PAIRS[pair]
    config = SemCKDConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    loss = SemCKDLoss.for_layers(students, teachers, loss_options(config), student_parameters=int(parameters))
    assert sum(entry.numel() for entry in loss.projection.parameters()) < 0.2 * parameters
    sharing = max(loss.comparison.projection_of.count(entry) for entry in loss.comparison.projection_of)
    assert sharing == layers_per_projection(students, teachers, int(parameters)) == shared


@pytest.mark.parametrize(
    ("options", "tokens", "side"),
    [({"max_tokens": 5, "max_grid": 3}, 5, 3), ({"max_tokens": 0, "max_grid": 0}, 20, 8), ({}, 16, 4)],
)
def test_a_configuration_says_how_much_is_compared(tmp_path, options, tokens, side):
    config = SemCKDConfig(str(tmp_path), use_cpu=True, report_to="none", **options)
    text = FeatureSpec.from_shape((20, 4), "text")
    image = FeatureSpec.from_shape((4, 8, 8), "map")
    loss = SemCKDLoss.for_layers([text, image], [text, image], loss_options(config))
    text_layer, map_layer = loss.select([normal(2, 20, 4), normal(2, 4, 8, 8)]).layers
    assert text_layer.tokens.shape == (2, tokens, 4) and map_layer.grid.shape == (2, 4, side, side)
    assert loss.samples_tokens == (tokens < 20)
