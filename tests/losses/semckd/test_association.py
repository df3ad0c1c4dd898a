"""Alignment, projections and association weights against numpy, naive loops and a numerical minimizer."""

import itertools

import numpy as np
import pytest
import torch
from scipy import optimize, special
from torch import nn

from hf_semckd.errors import RaggedBatchError
from hf_semckd.features.geometry import Alignment, as_map, as_tokens, common_grid, grid_of
from hf_semckd.features.layers import FeatureSpec
from hf_semckd.features.summaries import Average, summary
from hf_semckd.losses.semckd.association import (
    SimilarityAssociation,
    bound_of_cosine_weights,
    fixed_weights,
    kl_to_uniform,
    product_weights,
)
from hf_semckd.losses.semckd.networks import FeatureEmbedding, SimilarityEmbedding
from hf_semckd.losses.semckd.projection import ConvolutionalProjection

# A batch of one.
ONE = torch.zeros(1, dtype=torch.float64)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def map_spec(channels, height, width):
    return FeatureSpec("map", "map", channels, height * width, (height, width))


def image_tokens(channels, height, width, prefix):
    return FeatureSpec("image tokens", "tokens", channels, prefix + height * width, (height, width), prefix)


def text(channels, length):
    return FeatureSpec("text", "tokens", channels, length)


VECTOR = FeatureSpec("vector", "tokens", 6, 1)


# Alignment


@pytest.mark.parametrize(
    ("student", "teacher", "aligned", "kind"),
    [
        (map_spec(4, 8, 8), map_spec(6, 4, 4), True, "grid"),
        (map_spec(4, 8, 8), map_spec(4, 8, 8), True, "grid"),
        (map_spec(4, 7, 7), image_tokens(6, 14, 14, 1), True, "grid"),
        (image_tokens(6, 14, 14, 5), map_spec(4, 7, 7), True, "grid"),
        (image_tokens(4, 4, 4, 1), image_tokens(6, 4, 4, 1), True, "tokens"),
        (image_tokens(4, 4, 4, 2), image_tokens(6, 4, 4, 1), True, "grid"),
        (image_tokens(4, 2, 2, 1), image_tokens(6, 4, 4, 1), True, "grid"),
        (image_tokens(4, 2, 8, 1), image_tokens(6, 4, 4, 1), True, "grid"),
        (image_tokens(4, 4, 4, 1), image_tokens(6, 4, 4, 1), False, "grid"),
        (text(4, 9), text(6, 9), True, "tokens"),
        (text(4, 9), text(6, 9), False, "mean"),
        (text(4, 9), text(6, 11), True, "mean"),
        (text(4, 16), image_tokens(6, 4, 4, 0), True, "mean"),
        (map_spec(4, 8, 8), text(6, 64), True, "mean"),
        (VECTOR, map_spec(4, 8, 8), True, "mean"),
        (VECTOR, text(4, 9), True, "mean"),
        (VECTOR, VECTOR, True, "tokens"),
    ],
)
def test_alignment_of_two_layers(student, teacher, aligned, kind):
    assert Alignment.of(student, teacher, aligned).kind == kind


@pytest.mark.parametrize(
    ("student", "teacher", "expected"), [((8, 8), (4, 4), (4, 4)), ((2, 8), (4, 4), (2, 4)), ((3, 3), (3, 3), (3, 3))]
)
def test_common_grid_is_the_smaller_height_and_the_smaller_width(student, teacher, expected):
    left, right = map_spec(3, *student), image_tokens(5, *teacher, prefix=1)
    features = normal(2, 3, *student), normal(2, right.length, 5)
    assert common_grid(features[0], left, features[1], right) == expected


def test_the_grid_of_a_map_is_its_own_size_and_not_the_described_one():
    assert grid_of(normal(2, 3, 5, 6), map_spec(3, 8, 8)) == (5, 6)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_as_map_drops_class_and_register_tokens_and_pools(prefix):
    full = normal(2, 3, 4, 6)
    tokens = torch.cat([torch.full((2, prefix, 3), 1e6), full.flatten(2).mT], 1)
    spec = image_tokens(3, 4, 6, prefix)
    expected = full.numpy().reshape(2, 3, 2, 2, 2, 3).mean((3, 5))
    np.testing.assert_allclose(as_map(tokens, spec, (2, 2)), expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(as_map(full, map_spec(3, 4, 6), (2, 2)), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(as_map(tokens, spec, (4, 6)), full)


def test_as_tokens_gives_positions_of_maps_tokens_and_vectors():
    feature = normal(2, 3, 4, 5)
    assert torch.equal(as_tokens(feature)[:, 7], feature[:, :, 1, 2])
    assert as_tokens(feature[:, :, 0]).shape == (2, 3, 5)
    assert torch.equal(as_tokens(feature[:, :, 0, 0]), feature[:, None, :, 0, 0])


def test_as_mean_averages_maps_tokens_and_kept_tokens():
    feature, mask = normal(2, 4, 3), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    kept = np.stack([feature[0, :2].numpy().mean(0), feature[1, 1:].numpy().mean(0)])
    np.testing.assert_allclose(Average()(feature), feature.numpy().mean(1), rtol=1e-12)
    np.testing.assert_allclose(Average()(feature.mT[..., None]), feature.numpy().mean(1), rtol=1e-12)
    assert torch.equal(Average(mask)(feature[:, 0]), feature[:, 0])
    feature[mask == 0] = float("nan")
    for kind in (mask, mask.bool()):
        np.testing.assert_allclose(Average(kind)(feature), kept, rtol=1e-12)


def test_as_mean_of_many_half_precision_tokens_does_not_overflow():
    feature, mask = torch.full((2, 512, 3), 1000.0, dtype=torch.float16), torch.ones(2, 512)
    for kept in (None, mask):
        np.testing.assert_allclose(Average(kept)(feature).float(), 1000.0)


def test_summary_is_a_small_map_for_images_and_the_mean_for_text():
    feature = normal(2, 3, 8, 8)
    pooled = feature.numpy().reshape(2, 3, 4, 2, 4, 2).mean((3, 5)).reshape(2, -1)
    average = Average()
    found = summary(feature, map_spec(3, 8, 8), average)
    np.testing.assert_allclose(found, pooled, rtol=1e-10, atol=1e-14)
    small = feature[:, :, :2, :3]
    assert torch.equal(summary(small, map_spec(3, 2, 3), average), small.flatten(1))
    tokens = normal(2, 5, 3)
    np.testing.assert_allclose(summary(tokens, text(3, 5), average), tokens.numpy().mean(1), rtol=1e-12)
    assert summary(tokens.half(), text(3, 5), average).dtype == torch.float32


# Projections


def test_convolutional_projection_has_the_published_layout():
    layers = list(ConvolutionalProjection(5, 7))
    kinds = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    assert [type(layer) for layer in layers] == kinds
    shapes = [tuple(layer.weight.shape) for layer in layers if isinstance(layer, nn.Conv2d)]
    assert shapes == [(14, 5, 1, 1), (14, 14, 3, 3), (7, 14, 1, 1)]
    assert all(layer.bias is None for layer in layers if isinstance(layer, nn.Conv2d))


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutional_projection_keeps_the_grid(kernel):
    assert ConvolutionalProjection(5, 7, kernel)(torch.randn(2, 5, 3, 4)).shape == (2, 7, 3, 4)


def numpy_projection(rows, projection):
    """Project (rows, C_s) with 1x1 convolutions and batch statistics."""
    for layer in projection:
        if isinstance(layer, nn.Conv2d):
            rows = rows @ layer.weight.detach().numpy()[:, :, 0, 0].T
        elif isinstance(layer, nn.BatchNorm2d):
            rows = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + layer.eps)
        else:
            rows = np.maximum(rows, 0)
    return rows


@pytest.mark.parametrize("masked", [False, True])
def test_project_tokens_sees_kept_tokens_only_and_gives_zero_elsewhere(masked):
    torch.manual_seed(0)
    projection, tokens = ConvolutionalProjection(5, 3, 1).double(), normal(4, 6, 5)
    mask = (torch.arange(6) < torch.tensor([[2], [6], [1], [4]])).long() if masked else torch.ones(4, 6).long()
    tokens[mask == 0] = 1e5
    actual = projection.project_tokens(tokens, mask if masked else None).detach()
    np.testing.assert_allclose(
        actual[mask.bool()], numpy_projection(tokens[mask.bool()].numpy(), projection), rtol=1e-10
    )
    assert (actual[mask == 0] == 0).all()


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutional_projection_trains_on_a_single_position(kernel):
    projection = ConvolutionalProjection(5, 3, kernel)
    out = projection(torch.randn(1, 5, 1, 1))
    out.sum().backward()
    assert out.shape == (1, 3, 1, 1) and out.isfinite().all()
    assert all(entry.grad is not None for entry in projection.parameters())


# Query and key networks


@pytest.mark.parametrize("size", [4, 8, 10, 64])
def test_similarity_embedding_has_the_published_layout(size):
    first, middle, last = SimilarityEmbedding(size)
    assert isinstance(middle, nn.ReLU)
    assert (first.in_features, first.out_features) == (size, 2 * (size // 4))
    assert (last.in_features, last.out_features) == (2 * (size // 4), size // 4)


def test_similarity_embedding_is_the_normalized_two_layer_network():
    torch.manual_seed(0)
    embedding, rows = SimilarityEmbedding(8).double(), normal(8, 8)
    first, last = embedding[0], embedding[2]
    hidden = np.maximum(rows.numpy() @ first.weight.detach().numpy().T + first.bias.detach().numpy(), 0)
    out = hidden @ last.weight.detach().numpy().T + last.bias.detach().numpy()
    expected = out / np.linalg.norm(out, axis=1, keepdims=True)
    np.testing.assert_allclose(embedding(rows).detach(), expected, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_similarity_embedding_of_a_tiny_batch_has_one_dimension(size):
    assert SimilarityEmbedding(size)(torch.randn(size, size)).shape == (size, 1)


def test_similarity_embedding_refuses_another_batch_size():
    with pytest.raises(RaggedBatchError, match=r"(?s)a batch of 5.*8 samples.*dataloader_drop_last=True"):
        SimilarityEmbedding(8)(torch.randn(5, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_similarity_embedding_takes_large_similarities_under_autocast(dtype):
    torch.manual_seed(0)
    embedding, rows = SimilarityEmbedding(8), torch.rand(8, 8) * 1e7
    with torch.autocast("cpu", dtype=dtype):
        out = embedding(rows)
    torch.testing.assert_close(out.float(), embedding(rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_similarity_embedding_cast_to_half_precision_takes_float32_rows(dtype):
    assert SimilarityEmbedding(8).to(dtype)(torch.rand(8, 8)).isfinite().all()


def test_feature_embedding_has_unit_length_and_ignores_scale_and_the_rest_of_the_batch():
    torch.manual_seed(0)
    embedding, features = FeatureEmbedding(6).double(), normal(5, 6)
    out = embedding(features)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(embedding(features * 1000 + 7), out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(embedding(features[2:3]), out[2:3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_feature_embedding_takes_features_of_another_precision(dtype):
    assert FeatureEmbedding(6)(torch.randn(3, 6).to(dtype)).dtype == torch.float32


# Association weights


def test_product_weights_are_the_softmax_of_scaled_products():
    query, key = [normal(4, 3, seed=s) for s in range(2)], [normal(4, 3, seed=10 + t) for t in range(5)]
    actual = product_weights(query, key, 1.7)
    logits = np.array([[[1.7 * float(query[s][i] @ key[t][i]) for t in range(5)] for s in range(2)] for i in range(4)])
    np.testing.assert_allclose(actual, special.softmax(logits, axis=2), rtol=1e-12)


def test_similarity_weights_are_the_softmax_of_row_correlations():
    student, teacher = [normal(6, 4, seed=s) for s in range(2)], [normal(6, 5, seed=9 + t) for t in range(3)]

    def cosines(rows):
        rows = rows.numpy() / np.linalg.norm(rows.numpy(), axis=1, keepdims=True)
        return rows @ rows.T

    expected = np.empty((6, 2, 3))
    for i, s, t in np.ndindex(6, 2, 3):
        expected[i, s, t] = np.corrcoef(cosines(student[s])[i], cosines(teacher[t])[i])[0, 1]
    actual = SimilarityAssociation(0.2).of_summaries(student, teacher)
    np.testing.assert_allclose(actual, special.softmax(expected / 0.2, axis=2), rtol=1e-10)


def test_similarity_weights_follow_a_permutation_of_the_batch():
    student, teacher = [normal(7, 4, seed=s) for s in range(2)], [normal(7, 5, seed=9 + t) for t in range(3)]
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    expected = SimilarityAssociation(0.2).of_summaries(student, teacher)[order]
    actual = SimilarityAssociation(0.2).of_summaries([x[order] for x in student], [x[order] for x in teacher])
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)
    assert (expected - expected[torch.arange(7).roll(1)]).abs().max() > 0.01


def test_similarity_weights_of_one_sample_are_uniform():
    weights = SimilarityAssociation(0.2).of_summaries([normal(1, 4)] * 2, [normal(1, 5, seed=t) for t in range(4)])
    assert weights.tolist() == [[[0.25] * 4] * 2]


def test_similarity_weights_of_equal_samples_are_nearly_uniform():
    student = [normal(1, 40, seed=s, dtype=torch.float32).repeat(9, 1) for s in range(2)]
    teacher = [normal(1, 50, seed=5 + t, dtype=torch.float32).repeat(9, 1) for t in range(4)]
    weights = SimilarityAssociation(0.2).of_summaries(student, teacher)
    np.testing.assert_allclose(weights, 0.25, atol=0.1)


def test_similarity_weights_do_not_depend_on_scale_or_rotation_of_a_layer():
    student, teacher = [normal(6, 4)], [normal(6, 5, seed=1), normal(6, 5, seed=2)]
    rotation = torch.linalg.qr(normal(5, 5, seed=3)).Q
    expected = SimilarityAssociation(0.2).of_summaries(student, teacher)
    actual = SimilarityAssociation(0.2).of_summaries([student[0] * 100], [teacher[0] @ rotation, teacher[1] * 0.01])
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_similarity_weights_prefer_the_teacher_layer_that_sees_the_samples_alike():
    signal = normal(16, 8)
    weights = SimilarityAssociation(0.2).of_summaries([signal @ normal(8, 8, seed=5)], [normal(16, 8, seed=6), signal])
    assert weights.mean(0)[0].argmax() == 1


@pytest.mark.parametrize("extra", [1, 7])
def test_similarity_weights_of_text_do_not_change_with_padding(extra):
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    layers = [normal(4, 3, 5, seed=s) for s in range(4)]

    def weights(layers, mask):
        rows = [summary(layer, text(5, layer.shape[1]), Average(mask)) for layer in layers]
        return SimilarityAssociation(0.2).of_summaries(rows[:2], rows[2:])

    padded = [torch.cat([layer, torch.full((4, extra, 5), float("nan"))], 1) for layer in layers]
    wider = torch.cat([mask, torch.zeros(4, extra, dtype=mask.dtype)], 1)
    torch.testing.assert_close(weights(padded, wider), weights(layers, mask), rtol=1e-11, atol=1e-13)


def test_similarity_weights_carry_no_gradient():
    student = normal(4, 3).requires_grad_()
    assert not SimilarityAssociation(0.2).of_summaries([student], [normal(4, 3, seed=1)]).requires_grad


# Fixed weights


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (5, 2), (3, 3)])
@pytest.mark.parametrize("kind", ["uniform", "last", "one_to_one"])
def test_fixed_weights_are_distributions_over_teacher_layers(kind, shape):
    weights = fixed_weights(kind, *shape, ONE)[0]
    sums = weights.sum(1).tolist()
    assert weights.shape == shape and (weights >= 0).all()
    assert sums == ([0.0] * (shape[0] - 1) + [1.0] if kind == "last" else pytest.approx([1.0] * shape[0]))


def test_uniform_weights_are_equal_and_last_has_one_entry():
    assert fixed_weights("uniform", 2, 4, ONE)[0].tolist() == [[0.25] * 4] * 2
    assert fixed_weights("last", 2, 3, ONE)[0].tolist() == [[0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("students", "teachers", "expected"),
    [
        (3, 3, [0, 1, 2]),
        (2, 4, [1, 3]),
        (6, 12, [1, 3, 5, 7, 9, 11]),
        (4, 12, [2, 5, 8, 11]),
        (3, 4, [1, 2, 3]),
        (4, 2, [0, 0, 1, 1]),
        (4, 3, [0, 1, 2, 2]),
        (1, 5, [4]),
        (5, 1, [0] * 5),
    ],
)
def test_one_to_one_maps_each_student_layer_to_the_teacher_layer_of_its_depth(students, teachers, expected):
    weights = fixed_weights("one_to_one", students, teachers, ONE)[0]
    assert weights.argmax(1).tolist() == expected
    assert weights.sum(1).tolist() == [1.0] * students


def test_one_to_one_is_the_identity_for_equal_depths_and_never_goes_back():
    for students, teachers in itertools.product(range(1, 14), repeat=2):
        chosen = fixed_weights("one_to_one", students, teachers, ONE)[0].argmax(1).tolist()
        assert chosen == sorted(chosen) and chosen[-1] == teachers - 1
        assert students != teachers or chosen == list(range(teachers))
        assert len(set(chosen)) == min(students, teachers)


# What limits the weights


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("teachers", [1, 2, 3, 4])
def test_bound_of_cosine_weights_is_the_largest_weight_of_any_cosines(temperature, teachers):
    cosines = np.array(list(itertools.product(np.linspace(-1, 1, 9), repeat=teachers)))
    largest = special.softmax(cosines / temperature, axis=1).max()
    assert bound_of_cosine_weights(temperature, teachers) == pytest.approx(largest, rel=1e-12)


def test_bound_of_cosine_weights_agrees_with_the_measured_traps():
    assert bound_of_cosine_weights(1.0, 3) == pytest.approx(0.79, abs=0.005)
    assert bound_of_cosine_weights(1.0, 12) == pytest.approx(0.40, abs=0.005)


def test_free_energy_is_temperature_times_the_divergence_from_uniform():
    weights = torch.softmax(normal(3, 2, 5) * 2, -1)
    expected = 0.7 * special.rel_entr(weights.numpy(), np.full(5, 0.2)).sum(-1)
    np.testing.assert_allclose(kl_to_uniform(weights, 0.7), expected, rtol=1e-12)
    assert kl_to_uniform(torch.full((1, 1, 4), 0.25), 0.7).abs().max() < 1e-6
    assert kl_to_uniform(torch.tensor([[[1.0, 0.0]]]), 1.0).isfinite().all()


def minimizer(errors, temperature):
    """Return the minimum over the simplex of the weighted error plus `kl_to_uniform`, found numerically."""

    def objective(weights):
        restraint = kl_to_uniform(torch.from_numpy(weights), temperature)
        return float(weights @ errors + restraint.item())

    start = np.full(len(errors), 1 / len(errors))
    found = optimize.minimize(
        objective,
        start,
        method="SLSQP",
        bounds=[(1e-12, 1)] * len(errors),
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success
    return found.x


@pytest.mark.parametrize("temperature", [0.2, 0.5, 2.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_minimum_of_the_free_energy_is_the_gibbs_distribution(temperature, seed):
    errors = np.random.default_rng(seed).uniform(0, 1.5, size=4)
    found = minimizer(errors, temperature)
    np.testing.assert_allclose(found, special.softmax(-errors / temperature), atol=2e-5)


@pytest.mark.parametrize("temperature", [0.2, 0.5, 2.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_weight_at_the_minimum_is_below_the_bound(temperature, seed):
    errors = np.random.default_rng(seed).uniform(0, 1.5, size=4)
    bound = np.exp(-(errors.max() - errors.min()) / temperature) / len(errors)
    assert minimizer(errors, temperature).min() >= bound
    assert bound > 0
