"""Similarities of samples against naive loops and numpy."""

import itertools
import math

import numpy as np
import pytest
import torch
from naive import normal, relative

from hf_semckd.losses.similarity import row_cosine, similarity_matrix


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


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
