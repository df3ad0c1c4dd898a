"""Pure tensor functions against numpy formulas, naive loops and the autograd of the naive form."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import special

from hf_semckd.errors import InputError
from hf_semckd.features.geometry import map_to_tokens, pool_map, pool_tokens, tokens_to_map
from hf_semckd.features.precision import at_least_float32
from hf_semckd.losses.logits import binary_kd_loss, kd_loss
from hf_semckd.losses.reduction import entropy, masked_mean
from hf_semckd.losses.similarity import row_cosine, similarity_matrix


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def relative(actual, expected):
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))


# Logits


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kd_loss_is_temperature_squared_times_the_divergence(temperature):
    student, teacher = normal(3, 5, 7, seed=1) * 3, normal(3, 5, 7, seed=2) * 3
    p = special.softmax(teacher.numpy() / temperature, axis=-1)
    q = special.softmax(student.numpy() / temperature, axis=-1)
    expected = special.rel_entr(p, q).sum(-1) * temperature**2
    np.testing.assert_allclose(kd_loss(student, teacher, temperature), expected, rtol=1e-12)


def test_kd_loss_gradient_is_temperature_times_the_difference_of_probabilities():
    student, teacher = normal(4, 6, seed=3).requires_grad_(), normal(4, 6, seed=4).requires_grad_()
    kd_loss(student, teacher, 3.0).sum().backward()
    expected = 3.0 * (torch.softmax(student / 3, -1) - torch.softmax(teacher / 3, -1))
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-12, atol=1e-14)
    assert teacher.grad is None


def test_kd_loss_is_zero_for_equal_logits_up_to_a_shift_and_positive_else():
    logits = normal(4, 6, seed=5)
    assert kd_loss(logits + 7, logits, 2.0).abs().max() < 1e-13
    assert (kd_loss(normal(4, 6, seed=6), logits, 2.0) > 0).all()


@pytest.mark.parametrize("loss", [kd_loss, binary_kd_loss])
def test_logit_losses_stay_finite_on_extreme_logits(loss):
    student = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
    value = loss(student, torch.tensor([[-500.0, 500.0, 0.0]]), 1.0)
    value.sum().backward()
    assert value.isfinite().all() and student.grad.isfinite().all()


@pytest.mark.parametrize("loss", [kd_loss, binary_kd_loss])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logit_losses_compute_half_precision_logits_in_float32(loss, dtype):
    student, teacher = normal(4, 6, seed=7, dtype=dtype), normal(4, 6, seed=8, dtype=dtype)
    value = loss(student, teacher, 4.0)
    assert value.dtype == torch.float32
    np.testing.assert_allclose(value, loss(student.double(), teacher.double(), 4.0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_binary_kd_loss_is_the_mean_divergence_of_bernoullis(temperature):
    student, teacher = normal(3, 5, 4, seed=9) * 3, normal(3, 5, 4, seed=10) * 3
    p, q = special.expit(teacher.numpy() / temperature), special.expit(student.numpy() / temperature)
    divergence = special.rel_entr(p, q) + special.rel_entr(1 - p, 1 - q)
    expected = divergence.mean(-1) * temperature**2
    np.testing.assert_allclose(binary_kd_loss(student, teacher, temperature), expected, rtol=1e-11)


def test_binary_kd_loss_of_one_label_is_kd_loss_against_a_zero_logit():
    student, teacher = normal(8, 1, seed=11), normal(8, 1, seed=12)
    two_classes = kd_loss(torch.cat([student, 0 * student], 1), torch.cat([teacher, 0 * teacher], 1), 2.0)
    torch.testing.assert_close(binary_kd_loss(student, teacher, 2.0), two_classes, rtol=1e-12, atol=1e-14)


def test_binary_kd_loss_sends_no_gradient_to_the_teacher():
    student, teacher = normal(4, 3, seed=13).requires_grad_(), normal(4, 3, seed=14).requires_grad_()
    binary_kd_loss(student, teacher, 2.0).sum().backward()
    assert teacher.grad is None and student.grad is not None


# Similarity


def naive_similarity(features, mask=None, normalize=False):
    """Sum products over the entries (at kept positions) of two samples, one pair at a time."""
    mask = torch.ones(features.shape[:2]) if mask is None else mask

    def product(i, j):
        kept = [n for n in range(features.shape[1]) if mask[i, n] and mask[j, n]]
        return sum(math.fsum((features[i, n] * features[j, n]).flatten().tolist()) for n in kept)

    out = np.zeros((len(features), len(features)))
    for i, j in np.ndindex(out.shape):
        out[i, j] = product(i, j) / (math.sqrt(product(i, i) * product(j, j)) if normalize else 1.0)
    return out


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (4, 6, 3), (4, 7)])
def test_similarity_matrix_is_the_naive_sum_of_products(shape, normalize):
    features = normal(*shape, seed=15)
    actual = similarity_matrix(features, normalize=normalize)
    np.testing.assert_allclose(actual, naive_similarity(features, normalize=normalize), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("normalize", [False, True])
def test_similarity_matrix_leaves_masked_positions_out_even_when_they_are_nan(normalize):
    features, mask = normal(3, 5, 2, seed=16), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    expected = naive_similarity(features, mask, normalize)
    features[mask == 0] = float("nan")
    actual = similarity_matrix(features, mask, normalize=normalize)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_similarity_matrix_of_a_large_half_precision_map_does_not_overflow(dtype):
    features = (normal(2, 64, 28, 28, seed=17).abs() + 2).to(dtype)
    actual = similarity_matrix(features)
    assert actual.dtype == torch.float32
    assert float(actual.min()) > torch.finfo(torch.float16).max
    np.testing.assert_allclose(actual, features.double().flatten(1) @ features.double().flatten(1).T, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_similarities_are_not_lowered_by_autocast(dtype):
    features = normal(4, 3000, seed=18, dtype=torch.float32) * 10
    with torch.autocast("cpu", dtype=dtype):
        matrix = similarity_matrix(features)
        cosine = row_cosine(matrix[None], matrix[None])
    assert matrix.dtype == cosine.dtype == torch.float32
    assert relative(matrix, similarity_matrix(features.double())) < 1e-6


@pytest.mark.parametrize("normalize", [False, True])
def test_similarity_matrix_follows_a_permutation_of_the_batch(normalize):
    features, order = normal(6, 4, 3, seed=19), torch.randperm(6, generator=generator(1))
    matrix = similarity_matrix(features, normalize=normalize)
    permuted = similarity_matrix(features[order], normalize=normalize)
    torch.testing.assert_close(permuted, matrix[order][:, order], rtol=1e-12, atol=1e-13)


def naive_row_cosine(student, teacher):
    out = np.zeros((student.shape[1], len(student), len(teacher)))
    for s, t, i in itertools.product(range(len(student)), range(len(teacher)), range(student.shape[1])):
        a, b = student[s, i].numpy(), teacher[t, i].numpy()
        out[i, s, t] = np.corrcoef(a, b)[0, 1]
    return out


def test_row_cosine_is_the_correlation_of_two_rows():
    student, teacher = normal(2, 6, 6, seed=20), normal(3, 6, 6, seed=21)
    actual = row_cosine(student, teacher)
    assert actual.shape == (6, 2, 3)
    np.testing.assert_allclose(actual, naive_row_cosine(student, teacher), rtol=1e-11, atol=1e-13)


def test_row_cosine_follows_a_permutation_of_the_batch():
    student, teacher = normal(2, 6, 6, seed=22), normal(3, 6, 6, seed=23)
    order = torch.randperm(6, generator=generator(2))
    expected = row_cosine(student, teacher)[order]
    actual = row_cosine(student[:, order][:, :, order], teacher[:, order][:, :, order])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def test_row_cosine_of_one_sample_is_zero():
    assert row_cosine(normal(2, 1, 1), normal(3, 1, 1)).abs().max() == 0


def test_row_cosine_of_a_constant_row_is_zero_and_not_rounding_noise():
    same = normal(1, 50, seed=24, dtype=torch.float32).expand(7, -1)
    rows = similarity_matrix(same, normalize=True)
    other = similarity_matrix(normal(7, 50, seed=25, dtype=torch.float32), normalize=True)
    rows = rows + torch.linspace(-1e-7, 1e-7, 7)  # what another order of summation may give
    assert row_cosine(rows[None], other[None]).abs().max() < 0.2


# Grids


@pytest.mark.parametrize(("size", "target"), [((6, 6), (3, 3)), ((6, 4), (2, 2)), ((5, 7), (3, 4)), ((4, 4), (1, 1))])
def test_pool_map_averages_the_cells_that_overlap(size, target):
    features = normal(2, 3, *size, seed=26)
    expected = np.zeros((2, 3, *target))
    for h, w in np.ndindex(*target):
        top, bottom = h * size[0] // target[0], -(-(h + 1) * size[0] // target[0])
        left, right = w * size[1] // target[1], -(-(w + 1) * size[1] // target[1])
        expected[:, :, h, w] = features[:, :, top:bottom, left:right].numpy().mean((2, 3))
    np.testing.assert_allclose(pool_map(features, target), expected, rtol=1e-12, atol=1e-14)


def test_pool_map_returns_the_same_tensor_when_the_size_is_equal():
    features = normal(2, 3, 4, 5)
    assert pool_map(features, (4, 5)) is features


def test_map_to_tokens_goes_row_by_row():
    features = normal(2, 3, 4, 5, seed=27)
    tokens = map_to_tokens(features)
    assert tokens.shape == (2, 20, 3)
    for h, w in np.ndindex(4, 5):
        assert torch.equal(tokens[:, h * 5 + w], features[:, :, h, w])


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_tokens_to_map_drops_the_prefix_and_inverts_map_to_tokens(prefix):
    features = normal(2, 3, 4, 5, seed=28)
    tokens = torch.cat([torch.full((2, prefix, 3), 9.0), map_to_tokens(features)], 1)
    assert torch.equal(tokens_to_map(tokens, (4, 5)), features)


def test_tokens_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(InputError, match=r"(?s)19 tokens for a grid of 4 x 5.*at least 20"):
        tokens_to_map(normal(2, 19, 3), (4, 5))


POOLED = [((6, 6), (3, 3)), ((14, 14), (4, 4)), ((5, 7), (3, 4)), ((7, 5), (2, 5)), ((4, 4), (1, 1)), ((1, 6), (1, 4))]


@pytest.mark.parametrize(("grid", "size"), POOLED)
def test_pool_tokens_averages_the_cells_that_overlap(grid, size):
    maps = normal(2, 3, *grid, seed=40)
    tokens = maps.permute(0, 2, 3, 1).reshape(2, -1, 3)
    expected = np.zeros((2, 3, *size))
    for h, w in np.ndindex(*size):
        top, bottom = h * grid[0] // size[0], -(-(h + 1) * grid[0] // size[0])
        left, right = w * grid[1] // size[1], -(-(w + 1) * grid[1] // size[1])
        expected[:, :, h, w] = maps[:, :, top:bottom, left:right].numpy().mean((2, 3))
    actual = pool_tokens(tokens, grid, size)
    assert actual.shape == (2, 3, *size)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(actual, torch.nn.functional.adaptive_avg_pool2d(maps, size), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("grid", "size"), POOLED)
def test_pool_tokens_has_the_gradient_of_pooling_the_map(grid, size):
    tokens = normal(2, grid[0] * grid[1], 3, seed=41).requires_grad_()
    upstream = normal(2, 3, *size, seed=42)
    (actual,) = torch.autograd.grad(pool_tokens(tokens, grid, size), tokens, upstream)
    maps = tokens.transpose(1, 2).reshape(2, 3, *grid)
    (expected,) = torch.autograd.grad(torch.nn.functional.adaptive_avg_pool2d(maps, size), tokens, upstream)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)


def test_pool_tokens_to_the_same_size_rearranges_them():
    maps = normal(2, 3, 4, 5, seed=43)
    assert torch.equal(pool_tokens(map_to_tokens(maps), (4, 5), (4, 5)), maps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_pool_tokens_keeps_the_precision_and_is_not_lowered_by_autocast(dtype):
    tokens = normal(2, 196, 8, seed=44).to(dtype) + 3
    expected = pool_tokens(tokens.double(), (14, 14), (4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = pool_tokens(tokens, (14, 14), (4, 4))
    assert actual.dtype == dtype
    assert relative(actual, expected) < 2 * torch.finfo(dtype).eps


def test_pool_tokens_of_large_half_precision_values_does_not_overflow():
    tokens = torch.full((1, 196, 2), 60000.0, dtype=torch.float16)
    np.testing.assert_allclose(pool_tokens(tokens, (14, 14), (2, 2)).float(), 60000, rtol=2e-3)


# Masked means


def test_masked_mean_averages_the_kept_positions_of_each_sample():
    values, mask = normal(4, 5, seed=29), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0], [0] * 5])
    expected = [row[kept.bool()].mean() if kept.any() else 0.0 for row, kept in zip(values.numpy(), mask, strict=True)]
    values[mask == 0] = float("nan")
    for kind in (mask, mask.bool(), mask.double()):
        np.testing.assert_allclose(masked_mean(values, kind), expected, rtol=1e-12)


def test_masked_mean_without_a_mask_is_the_mean():
    values = normal(4, 5, seed=30)
    np.testing.assert_allclose(masked_mean(values, None), values.numpy().mean(1), rtol=1e-12)


def test_masked_mean_gives_no_gradient_to_masked_positions():
    values, mask = normal(3, 4, seed=31).requires_grad_(), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    masked_mean(values, mask).sum().backward()
    expected = torch.tensor([[0.5, 0.5, 0, 0], [0.25] * 4, [0.0] * 4], dtype=torch.float64)
    torch.testing.assert_close(values.grad, expected)


# Small helpers


def test_entropy_is_log_of_the_count_when_uniform_and_zero_on_one_layer():
    weights = torch.tensor([[0.25] * 4, [0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    np.testing.assert_allclose(entropy(weights), [math.log(4), 0.0, math.log(2)], atol=1e-15)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_at_least_float32_widens_half_precision_only(dtype, expected):
    assert at_least_float32(torch.ones(2, dtype=dtype)).dtype == expected
