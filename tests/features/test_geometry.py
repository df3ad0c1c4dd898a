"""Alignment and pooling of layers against numpy and the autograd of the plain form."""

import numpy as np
import pytest
import torch
from naive import normal, relative

from hf_semckd.errors import InputError
from hf_semckd.features.geometry import (
    Alignment,
    Average,
    as_map,
    as_tokens,
    common_grid,
    fitting_mask,
    grid_of,
    map_to_tokens,
    pool_map,
    pool_tokens,
)
from hf_semckd.features.layers import FeatureSpec


def map_spec(channels, height, width):
    return FeatureSpec("map", "map", channels, height * width, (height, width))


def image_tokens(channels, height, width, prefix):
    return FeatureSpec("image tokens", "tokens", channels, prefix + height * width, (height, width), prefix)


def text(channels, length):
    return FeatureSpec("text", "tokens", channels, length)


VECTOR = FeatureSpec("vector", "tokens", 6, 1)


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
def test_as_map_drops_the_prefix_and_inverts_map_to_tokens(prefix):
    features = normal(2, 3, 4, 5, seed=28)
    tokens = torch.cat([torch.full((2, prefix, 3), 9.0), map_to_tokens(features)], 1)
    assert torch.equal(as_map(tokens, image_tokens(3, 4, 5, prefix), (4, 5)), features)


def test_tokens_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(InputError, match=r"(?s)19 tokens.*20: 0 in front of a grid of \(4, 5\)"):
        as_map(normal(2, 19, 3), image_tokens(3, 4, 5, 0), (4, 5))


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


def test_a_mask_follows_pooled_tokens():
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]])
    fitted = fitting_mask(mask, torch.zeros(2, 4, 3))
    assert fitted.tolist() == [[True, True, True, False], [True, False, False, False]]
    feature = torch.arange(24.0).view(2, 4, 3)
    expected = torch.stack([feature[0, :3].mean(0), feature[1, 0]])
    torch.testing.assert_close(Average(mask)(feature), expected)
    assert fitting_mask(mask, torch.zeros(2, 9, 3)) is None and fitting_mask(mask, torch.zeros(4, 8, 3)) is None
