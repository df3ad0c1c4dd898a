"""Running channel statistics against numpy over all the data seen, however the data is cut."""

import numpy as np
import pytest
import torch

from hf_semckd.features import statistics as statistics_module
from hf_semckd.features.statistics import (
    PRIOR_POSITIONS,
    VARIANCE_FLOOR,
    ChannelStatistics,
    merge_layers,
    update_layer_statistics,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def data(seed=0):
    """Maps of 8 samples whose four channels differ in place and spread."""
    scale = torch.tensor([1.0, 5.0, 0.1, 30.0], dtype=torch.float64)
    return normal(8, 4, 3, 2, seed=seed) * scale[:, None, None] + torch.tensor([0.0, -3, 2, 100])[:, None, None]


def observe(statistics, features, mask=None):
    update_layer_statistics([statistics], [features], [mask])


def statistics_of(*batches, channels=4, masks=None, dtype=torch.float64):
    statistics = ChannelStatistics(channels).to(dtype)
    for index, batch in enumerate(batches):
        observe(statistics, batch, None if masks is None else masks[index])
        merge_layers([statistics], [statistics.pending()])
    return statistics


def rows(features):
    """Return all positions as (positions, channels) numpy rows."""
    if features.dim() == 4:
        features = features.permute(0, 2, 3, 1)
    return features.reshape(-1, features.shape[-1]).double().numpy()


def assert_moments(statistics, values, rtol=1e-11):
    np.testing.assert_allclose(statistics.mean, values.mean(0), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(statistics.variance, values.var(0), rtol=rtol, atol=rtol)
    assert float(statistics.count) == len(values)


def test_fresh_statistics_leave_features_nearly_as_they_are():
    features = data()
    np.testing.assert_allclose(ChannelStatistics(4).double()(features), features, rtol=1e-5)


@pytest.mark.parametrize("layout", ["map", "tokens"])
def test_moments_are_those_of_all_data_seen(layout):
    features = data() if layout == "map" else data().flatten(2).transpose(1, 2)
    second = features * 3 + 1
    assert_moments(statistics_of(features, second), np.concatenate([rows(features), rows(second)]))


@pytest.mark.parametrize("parts", [[8], [4, 4], [1] * 8, [3, 5], [7, 1]])
def test_moments_do_not_depend_on_how_the_data_is_cut(parts):
    assert_moments(statistics_of(*data().split(parts)), rows(data()))


@pytest.mark.parametrize("seed", [1, 2])
def test_moments_do_not_depend_on_the_order_of_the_data(seed):
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    assert_moments(statistics_of(*data()[order].split(2)), rows(data()))


def test_several_observations_may_be_merged_at_once():
    statistics = statistics_of(data(seed=5))
    for part in data().split(2):
        observe(statistics, part)
    merge_layers([statistics], [statistics.pending()])
    assert_moments(statistics, np.concatenate([rows(data(seed=5)), rows(data())]))


def test_sums_of_two_processes_give_the_moments_of_both():
    first, second = statistics_of(data(seed=5)), statistics_of(data(seed=5))
    observe(first, data()[:3])
    observe(second, data()[3:])
    sums = first.pending() + second.pending()
    merge_layers([first], [sums])
    merge_layers([second], [sums])
    assert_moments(first, np.concatenate([rows(data(seed=5)), rows(data())]))
    assert torch.equal(first.mean, second.mean) and torch.equal(first.variance, second.variance)


def test_a_process_without_data_adds_nothing():
    busy, idle = statistics_of(data()), statistics_of(data())
    observe(busy, data(seed=1))
    sums = busy.pending() + idle.pending()
    assert sums.shape == (1 + 2 * 4,)
    merge_layers([busy], [sums])
    assert_moments(busy, np.concatenate([rows(data()), rows(data(seed=1))]))


def test_merging_nothing_changes_nothing():
    statistics = statistics_of(data())
    before = {name: value.clone() for name, value in statistics.state_dict().items()}
    merge_layers([statistics], [statistics.pending()])
    fresh = ChannelStatistics(4)
    merge_layers([fresh], [fresh.pending()])
    assert all(torch.equal(value, before[name]) for name, value in statistics.state_dict().items())
    assert torch.equal(fresh.mean, torch.zeros(4)) and torch.equal(fresh.variance, torch.ones(4))


def test_pending_forgets_what_it_returned():
    statistics = ChannelStatistics(4)
    observe(statistics, data().float())
    assert statistics.pending().abs().sum() > 0
    assert statistics.pending().abs().sum() == 0


def padded(width, filling):
    """Return five token sequences of lengths 1 to 5, padded to `width`, with their mask."""
    mask = (torch.arange(width) < torch.arange(1, 6)[:, None]).long()
    tokens = torch.full((5, width, 3), filling, dtype=torch.float64)
    tokens[:, :5] = torch.where(mask[:, :5, None] > 0, normal(5, 5, 3) * 2 + 1, tokens[:, :5])
    return tokens, mask


@pytest.mark.parametrize("filling", [0.0, 1e6, float("nan"), float("inf")])
@pytest.mark.parametrize("width", [5, 6, 12])
def test_padding_does_not_reach_the_moments(width, filling):
    tokens, mask = padded(width, filling)
    assert_moments(statistics_of(tokens, channels=3, masks=[mask]), tokens[mask.bool()].numpy())
    assert_moments(statistics_of(tokens, channels=3, masks=[mask.bool()]), tokens[mask.bool()].numpy())


def test_batches_of_different_padding_add_up():
    narrow, wide = padded(5, float("nan")), padded(9, 1e3)
    statistics = statistics_of(narrow[0][:2], wide[0][2:], channels=3, masks=[narrow[1][:2], wide[1][2:]])
    assert_moments(statistics, narrow[0][narrow[1].bool()].numpy())


def test_a_fully_masked_batch_adds_nothing():
    tokens, mask = padded(5, 0.0)
    statistics = statistics_of(tokens, normal(2, 5, 3), channels=3, masks=[mask, torch.zeros(2, 5)])
    assert_moments(statistics, tokens[mask.bool()].numpy())


@pytest.mark.parametrize("parts", [[64], [16] * 4, [1] * 64])
def test_large_offsets_keep_their_variance_in_float32(parts):
    features = normal(64, 3, 4, 4, dtype=torch.float32) * torch.tensor([1.0, 2.0, 0.5])[:, None, None] + 1e4
    statistics = statistics_of(*features.split(parts), channels=3, dtype=torch.float32)
    np.testing.assert_allclose(statistics.mean, rows(features).mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.variance, rows(features).var(0), rtol=1e-3)


@pytest.mark.parametrize("filling", [0.0, -1e6, float("nan")])
@pytest.mark.parametrize("at_once", [True, False])
def test_large_offsets_keep_their_variance_beside_padding_and_before_the_first_merge(at_once, filling):
    tokens, mask = normal(64, 9, 3, dtype=torch.float32) + 1e4, torch.arange(9) < torch.arange(64)[:, None] % 9 + 1
    tokens[~mask] = filling
    statistics = ChannelStatistics(3)
    for part, kept in zip(tokens.split(16), mask.split(16), strict=True):
        observe(statistics, part, kept)
        if not at_once:
            merge_layers([statistics], [statistics.pending()])
    merge_layers([statistics], [statistics.pending()])
    values = tokens[mask].double().numpy()
    assert float(statistics.count) == len(values)
    np.testing.assert_allclose(statistics.mean, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.variance, values.var(0), rtol=1e-3)


def scaled_variance(values):
    """Return the variance that channels are divided by: drawn to the layer's mean by a prior, and never zero."""
    own, typical, count = values.var(0), values.var(0).mean(), len(values)
    return (count * own + PRIOR_POSITIONS * typical) / (count + PRIOR_POSITIONS) + VARIANCE_FLOOR * typical


def test_channels_have_mean_zero_and_come_to_variance_one_the_more_was_seen():
    few, many = normal(8, 3, 2, 2), normal(20000, 3, 2, 2)
    spread = torch.tensor([0.01, 1.0, 3.0])[:, None, None]
    for features, tolerance in ((few * spread, 1.0), (many * spread, 0.05)):
        deviation = rows(statistics_of(features, channels=3)(features)).std(0)
        assert abs(deviation[1:] - 1).max() < tolerance
    asleep = torch.cat([few * 0, normal(1, 3, 2, 2)])
    asleep[:8, 0] = normal(8, 2, 2)
    woken = statistics_of(asleep[:8], channels=3)(asleep)
    assert woken.abs().max() < 20, "a channel that was silent at first must not explode when it wakes"


def test_standardized_channels_have_mean_zero_and_variance_one():
    features = data()
    standardized = rows(statistics_of(features)(features))
    expected = rows(features).var(0) / scaled_variance(rows(features))
    np.testing.assert_allclose(standardized.mean(0), 0, atol=1e-11)
    np.testing.assert_allclose(standardized.var(0), expected, rtol=1e-11)


def test_standardizing_is_the_numpy_formula_for_maps_and_tokens():
    features, statistics = data(), statistics_of(data(seed=3))
    values = rows(data(seed=3))
    scale = np.sqrt(scaled_variance(values))
    expected = (rows(features) - values.mean(0)) / scale
    np.testing.assert_allclose(rows(statistics(features)), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(rows(statistics(features.flatten(2).transpose(1, 2))), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 0.1, -7.3, 1234.567])
def test_a_dead_channel_among_live_ones_stays_near_zero(offset):
    features = normal(16, 3, 4, 4, dtype=torch.float32)
    features[:, 1] = offset
    standardized = statistics_of(*features.split(5), channels=3, dtype=torch.float32)(features)
    assert standardized[:, 1].abs().max() < 0.1
    own, divided = rows(features).var(0)[0], scaled_variance(rows(features))[0]
    assert standardized[:, 0].std() == pytest.approx((own / divided) ** 0.5, rel=1e-2)


@pytest.mark.parametrize("offset", [0.0, 0.0049382486, 0.10773043, -7.3, 1234.567])
def test_a_layer_of_dead_channels_does_not_explode(offset):
    features = torch.full((31, 3, 3, 3), offset)
    standardized = statistics_of(*features.split(5), channels=3, dtype=torch.float32)(features)
    assert standardized.abs().max() < 1.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_standardized_in_float32(dtype):
    features = (normal(16, 3, 4, 4) * 200 + 500).to(dtype)
    statistics = statistics_of(features, channels=3, dtype=torch.float32)
    assert statistics(features).dtype == torch.float32
    np.testing.assert_allclose(statistics.variance, rows(features).var(0), rtol=1e-5)


def test_observing_alone_does_not_change_the_forward():
    statistics = statistics_of(data(seed=3))
    before = statistics(data())
    observe(statistics, data() * 100)
    assert torch.equal(statistics(data()), before)
    merge_layers([statistics], [statistics.pending()])
    assert not torch.allclose(statistics(data()), before)


def test_state_dict_round_trip_continues_exactly():
    statistics = statistics_of(data())
    restored = ChannelStatistics(4).double()
    restored.load_state_dict(statistics.state_dict())
    for entry in (statistics, restored):
        observe(entry, data(seed=8))
        merge_layers([entry], [entry.pending()])
    assert set(statistics.state_dict()) == {"mean", "variance", "count"}
    assert all(torch.equal(value, restored.state_dict()[name]) for name, value in statistics.state_dict().items())


def test_statistics_carry_no_gradient_and_pass_one_through():
    statistics, features = statistics_of(data()), data().requires_grad_()
    observe(statistics, features)
    assert not statistics.pending().requires_grad
    assert not list(statistics.parameters())
    statistics(features).sum().backward()
    assert features.grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_in_a_module_cast_to_half_precision_stay_exact(dtype):
    statistics = torch.nn.Sequential(ChannelStatistics(3)).to(dtype)[0]
    parts = [normal(2, 4, 3, seed=seed).to(dtype) for seed in range(400)]
    for part in parts:
        observe(statistics, part)
        merge_layers([statistics], [statistics.pending()])
    assert_moments(statistics, rows(torch.cat(parts)), rtol=1e-5)


@pytest.mark.parametrize("limit", [1, 2**20], ids=["one by one", "together"])
def test_several_layers_are_observed_as_each_alone(limit, monkeypatch):
    monkeypatch.setattr(statistics_module, "GROUP_BYTES", {"cpu": limit})
    tokens, mask = padded(5, float("nan"))
    # Two like layers, one of another width, one under the mask, and a map.
    layers = [normal(3, 6, 4), normal(3, 6, 4, seed=1) * 9 + 2, normal(3, 6, 2, seed=2), tokens, data()]
    masks = [None, None, None, mask, None]
    entries = [ChannelStatistics(layer.shape[1 if layer.dim() == 4 else 2]).double() for layer in layers]
    for _ in range(2):
        update_layer_statistics(entries, layers, masks)
    merge_layers(entries, [entry.pending() for entry in entries])
    for entry, layer, kept in zip(entries, layers, masks, strict=True):
        values = rows(layer) if kept is None else layer[kept != 0].double().numpy()
        assert_moments(entry, np.concatenate([values, values]))


def test_a_single_position_is_not_blown_up_by_the_rounding_of_its_mean():
    layer = ChannelStatistics(3)
    position = 100 * torch.randn(1, 1, 3, generator=torch.Generator().manual_seed(0))
    update_layer_statistics([layer], [position], [None])
    merge_layers([layer], [layer.pending()])
    nearby = position * (1 + torch.finfo(torch.float32).eps)
    assert layer(nearby).abs().max() <= 2
