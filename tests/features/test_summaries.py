"""Averages and summaries against numpy."""

import numpy as np
import torch
from naive import normal

from hf_semckd.features.geometry import Average, summary
from hf_semckd.features.layers import FeatureSpec


def map_spec(channels, height, width):
    return FeatureSpec("map", "map", channels, height * width, (height, width))


def text(channels, length):
    return FeatureSpec("text", "tokens", channels, length)


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
