"""Means and entropies against numpy."""

import math

import numpy as np
import torch
from naive import normal

from hf_semckd.losses.positions import entropy, masked_mean


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


def test_entropy_is_log_of_the_count_when_uniform_and_zero_on_one_layer():
    weights = torch.tensor([[0.25] * 4, [0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    np.testing.assert_allclose(entropy(weights), [math.log(4), 0.0, math.log(2)], atol=1e-15)
