"""Which tokens are compared, against whole numbers and plain loops; and that content alone decides."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from hf_semckd.features.token_sampling import content_phase, flat_positions, spread_positions
from hf_semckd.features.token_sampling import take_positions as take_flat

LIMITS = [1, 2, 3, 7, 16, 200]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sentences(count, longest=40, seed=0, vocabulary=30000):
    """Return token ids of different lengths, without padding."""
    lengths = torch.randint(1, longest + 1, (count,), generator=generator(seed))
    return [
        torch.randint(1, vocabulary, (int(n),), generator=generator(1000 * seed + i)) for i, n in enumerate(lengths)
    ]


def padded(rows, width, side, filling):
    ids, mask = torch.full((len(rows), width), filling), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


# Phases


def naive_phase(integers):
    """Return the phase of a sample's integers, in exact arithmetic."""
    total = sum(n ^ (n >> 32) for n in integers)
    return ((total * 2654435761) % 2**32 // 2**8) / 2**24


def test_a_phase_is_the_multiplicative_hash_of_the_sum():
    rows = sentences(50)
    phase = content_phase(*padded(rows, 40, "right", 0))
    assert phase.dtype == torch.float32 and phase.tolist() == [naive_phase(row.tolist()) for row in rows]
    assert phase.tolist() == [((int(row.sum()) * 2654435761) % 2**32 // 2**8) / 2**24 for row in rows]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_the_high_half_of_an_integer_counts_as_much_as_the_low_one(dtype):
    span = torch.iinfo(dtype)
    values = torch.randint(span.min, span.max, (20, 5, 7), generator=generator(20), dtype=dtype)
    values[0, 0, :2] = torch.tensor([span.min, span.max], dtype=dtype)
    assert content_phase(values).tolist() == [naive_phase(row.flatten().tolist()) for row in values]


@pytest.mark.parametrize(("dtype", "bits"), [(np.float16, np.int16), (np.float32, np.int32), (np.float64, np.int64)])
def test_floats_are_hashed_by_their_bits(dtype, bits):
    pixels = np.random.default_rng(1).normal(size=(6, 3, 4, 4)).astype(dtype)
    expected = [naive_phase(image.view(bits).flatten().tolist()) for image in pixels]
    assert content_phase(torch.from_numpy(pixels)).tolist() == expected


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float32])
@pytest.mark.parametrize("filling", [0, 1, 29999])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("width", [40, 41, 300])
def test_padding_does_not_reach_a_phase(width, side, filling, kind):
    rows = sentences(20)
    alone = torch.cat([content_phase(row[None]) for row in rows])
    ids, mask = padded(rows, width, side, filling)
    assert torch.equal(content_phase(ids, mask.to(kind)), alone)


def images(dtype=torch.float32):
    return torch.randn(12, 3, 6, 6, generator=generator(2)).to(dtype)


CONTENTS = {
    "ids": lambda: torch.randint(0, 30000, (12, 9), generator=generator(3)),
    "int32 ids": lambda: torch.randint(0, 30000, (12, 9), generator=generator(3)).int(),
    "bytes": lambda: torch.randint(0, 256, (12, 3, 6, 6), generator=generator(3)).byte(),
    **{str(dtype): lambda dtype=dtype: images(dtype) for dtype in (torch.float16, torch.bfloat16)},
    **{str(dtype): lambda dtype=dtype: images(dtype) for dtype in (torch.float32, torch.float64)},
}


@pytest.mark.parametrize("content", CONTENTS)
def test_a_phase_depends_neither_on_the_order_nor_on_the_size_of_the_batch(content):
    values = CONTENTS[content]()
    order = torch.randperm(12, generator=generator(4))
    whole = content_phase(values)
    assert whole.shape == (12,) and whole.min() >= 0 and whole.max() < 1
    assert torch.equal(content_phase(values[order]), whole[order])
    assert torch.equal(torch.cat([content_phase(part) for part in values.split([1, 4, 7])]), whole)


@pytest.mark.parametrize("content", CONTENTS)
def test_different_samples_have_different_phases(content):
    assert len(set(content_phase(CONTENTS[content]()).tolist())) == 12


def test_the_layout_in_memory_does_not_reach_a_phase():
    values = images()
    assert torch.equal(content_phase(values.contiguous(memory_format=torch.channels_last)), content_phase(values))
    assert torch.equal(content_phase(values.mT.contiguous().mT), content_phase(values))


def test_a_mask_that_speaks_of_something_else_is_not_used():
    assert torch.equal(content_phase(images(), torch.zeros(12, 9)), content_phase(images()))


@pytest.mark.parametrize("change", ["one id", "one pixel"])
def test_a_small_change_moves_a_phase_far(change):
    if change == "one id":
        values = torch.full((200, 8), 5)
        values[:, 3] += torch.arange(200)
    else:
        values = torch.zeros(200, 3, 4, 4)
        values[:, 1, 2, 2] = torch.arange(200) / 255
    phase = content_phase(values).double().numpy()
    distance = np.abs(np.diff(phase))
    assert np.minimum(distance, 1 - distance).mean() > 0.1 and len(set(phase)) == 200


def many(kind):
    count = 3000
    if kind == "sentences":
        return padded(sentences(count, seed=5), 40, "right", 0)
    if kind == "short sentences of few words":
        return torch.randint(0, 50, (count, 6), generator=generator(6)), None
    if kind == "byte pixels":
        return torch.randint(0, 256, (count, 3, 8, 8), generator=generator(7)).byte(), None
    scaled = torch.randint(0, 256, (count, 3, 8, 8), generator=generator(7)) / 255
    return {
        "normal pixels": torch.randn(count, 3, 8, 8, generator=generator(8)),
        "half precision": torch.randn(count, 3, 8, 8, generator=generator(8)).half(),
        "brain floats": torch.randn(count, 3, 8, 8, generator=generator(8)).bfloat16(),
        "scaled bytes": scaled,
        "standardized bytes": (scaled - 0.45) / 0.22,
        "doubles": torch.randn(count, 3, 8, 8, generator=generator(8), dtype=torch.float64),
        "widened floats": torch.randn(count, 3, 8, 8, generator=generator(8)).double(),
    }[kind], None


@pytest.mark.parametrize(
    "kind",
    [
        "sentences",
        "byte pixels",
        "normal pixels",
        "half precision",
        "brain floats",
        "scaled bytes",
        "standardized bytes",
        "doubles",
        "widened floats",
    ],
)
def test_phases_of_many_samples_are_about_uniform(kind):
    phases = content_phase(*many(kind)).double().numpy()
    assert stats.kstest(phases, "uniform").statistic < 1.95 / math.sqrt(len(phases)), "p below 0.001"


def test_few_sums_still_spread_their_phases():
    values, _ = many("short sentences of few words")
    phases = np.unique(content_phase(values).double().numpy())
    assert len(phases) == len(set(values.sum(1).tolist()))
    assert np.diff(np.concatenate([[0], phases, [1]])).max() < 4 / len(phases)


# Positions


def naive_positions(row, limit, phase):
    """Return the positions of the chosen tokens of one sample, in exact arithmetic."""
    tokens = [n for n, kept in enumerate(row) if kept]
    chosen = min(len(tokens), limit)
    return [tokens[math.floor((k + Fraction(float(phase))) * len(tokens) / chosen)] for k in range(chosen)]


def random_masks(batch, length, seed):
    """Return masks with padding on the right, on the left, with holes, with everything, and with one token."""
    lengths = torch.randint(1, length + 1, (batch,), generator=generator(seed))
    right = torch.arange(length) < lengths[:, None]
    holes = torch.rand(batch, length, generator=generator(seed)) < 0.5
    holes[:, seed % length] = True
    ones = torch.ones(1, length, dtype=torch.bool)
    single = torch.arange(length)[None] == length // 2
    return torch.cat([right, right.flip(1), holes, ones, single]).long()


@pytest.mark.parametrize("phased", [True, False])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("length", [1, 2, 7, 10, 33])
def test_chosen_tokens_are_those_of_exact_arithmetic(length, limit, phased):
    mask = random_masks(6, length, seed=length)
    phase = torch.rand(len(mask), generator=generator(9)) if phased else None
    positions, kept = spread_positions(length, limit, mask=mask, phase=phase, like=mask)
    width = min(length, limit)
    assert positions.shape == kept.shape == (len(mask), width) and positions.dtype == torch.long
    assert positions.min() >= 0 and positions.max() < length
    for i, row in enumerate(mask.tolist()):
        expected = naive_positions(row, limit, 0 if phase is None else phase[i])
        assert positions[i][kept[i]].tolist() == expected
        assert kept[i].tolist() == [k < len(expected) for k in range(width)]
        assert len(expected) == min(sum(row), limit) and all(row[n] for n in expected)
        assert expected == sorted(set(expected))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("length", [1, 2, 7, 10, 197])
def test_without_a_mask_all_places_are_taken_as_with_a_mask_of_ones(length, limit):
    phase = torch.rand(5, generator=generator(10))
    like = torch.zeros(5, length, 3)
    positions, kept = spread_positions(length, limit, phase=phase, like=like)
    masked, all_kept = spread_positions(length, limit, mask=torch.ones(5, length), phase=phase, like=like)
    assert kept is None and all_kept.all() and torch.equal(positions, masked)
    for i in range(5):
        assert positions[i].tolist() == naive_positions([1] * length, limit, phase[i])


@pytest.mark.parametrize("limit", [1, 3, 10, 16, 48, 49, 100, 511, 5000])
def test_no_rounding_moves_a_rank_however_long_the_sample(limit):
    # The last phases before the next token, the first ones after it, and some between.
    numerators = [0, 1, 2**23 - 1, 2**23, 2**24 // 3, 2**24 // 3 + 1, 2**24 // 7, 2**24 - 2, 2**24 - 1]
    phase = torch.tensor(numerators).float() / 2**24
    for length in [*range(1, 60), 197, 512, 577, 1000, 4096, 32768]:
        positions, _ = spread_positions(length, limit, phase=phase, like=phase)
        chosen = min(length, limit)
        rows = np.arange(chosen, dtype=object) * 2**24 + np.array(numerators, dtype=object)[:, None]
        expected = (rows * length // (chosen * 2**24)).astype(np.int64)
        assert np.array_equal(positions, expected), length
        assert (np.diff(expected, axis=1) > 0).all() and expected.max() < length, length


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("tokens", [1, 5, 8, 12])
def test_over_all_phases_every_token_is_as_likely_as_any_other(tokens, limit, padding):
    # Each token has m / n of all phases, in one or two pieces: as many of the grid, give or take one.
    phases = 16 * tokens if tokens & (tokens - 1) else 64
    phase = ((torch.arange(phases) + 0.5) / phases).float()
    row = {
        "none": [1] * tokens,
        "left": [0] * 4 + [1] * tokens,
        "right": [1] * tokens + [0] * 4,
        "holes": [entry for _ in range(tokens) for entry in (0, 1)],
    }[padding]
    mask = torch.tensor([row] * phases)
    positions, kept = spread_positions(len(row), limit, mask=mask, phase=phase, like=mask)
    counts = torch.bincount(positions[kept], minlength=len(row))
    assert counts[mask[0] == 0].sum() == 0
    expected = phases * min(tokens, limit) / tokens
    assert (counts[mask[0] == 1] - expected).abs().max() <= 1


def test_the_mean_over_chosen_tokens_is_an_unbiased_estimate():
    values = torch.randn(10, generator=generator(11), dtype=torch.float64)
    phase = (torch.arange(1000) + 0.5) / 1000
    positions, _ = spread_positions(10, 3, phase=phase, like=phase)
    assert float(values[positions].mean()) == pytest.approx(float(values.mean()), abs=2e-3)
    single = values[spread_positions(10, 3, phase=phase[:1], like=phase[:1])[0]].mean()
    assert abs(float(single - values.mean())) > 0.02, "one phase alone would not do"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("width", [12, 13, 40])
def test_more_padding_chooses_the_same_tokens(width, side):
    rows, phase = sentences(20, longest=12, seed=12), torch.rand(20, generator=generator(13))
    mask = padded(rows, width, side, 0)[1]
    positions, kept = spread_positions(width, 5, mask=mask, phase=phase, like=mask)
    for i, row in enumerate(rows):
        first = 0 if side == "right" else width - len(row)
        alone, _ = spread_positions(len(row), 5, phase=phase[i : i + 1], like=row[None])
        assert (positions[i][kept[i]] - first).tolist() == alone[0].tolist()


def test_a_sample_without_any_token_keeps_none_and_disturbs_nobody():
    mask = torch.tensor([[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1]])
    positions, kept = spread_positions(6, 3, mask=mask, phase=torch.tensor([0.9, 0.0, 0.9]), like=mask)
    assert kept.tolist() == [[False] * 3, [True] * 3, [True, True, False]]
    assert positions.min() >= 0 and positions.max() < 6
    assert positions[1].tolist() == [0, 1, 3] and positions[2, :2].tolist() == [4, 5]


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32, torch.float16])
def test_any_kind_of_mask_will_do(kind):
    mask, phase = random_masks(6, 9, seed=3), torch.rand(20, generator=generator(14))
    expected = spread_positions(9, 3, mask=mask, phase=phase, like=mask)
    actual = spread_positions(9, 3, mask=mask.to(kind), phase=phase, like=mask)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_shapes_follow_from_shapes_alone():
    # Tensors without values: whatever had to look at one, on a GPU after waiting for it, would fail here.
    mask, tokens = torch.ones(4, 10, device="meta"), torch.zeros(4, 10, 3, device="meta")
    phase = content_phase(torch.ones(4, 10, dtype=torch.long, device="meta"), mask)
    assert content_phase(torch.zeros(4, 3, 8, 8, device="meta")).shape == phase.shape == (4,)
    positions, kept = spread_positions(10, 3, mask=mask, phase=phase, like=tokens)
    assert positions.shape == kept.shape == (4, 3)
    assert take_positions(tokens, positions).shape == (4, 3, 3)


# Taking


def take_positions(tokens, positions):
    return take_flat(tokens, flat_positions(positions, tokens.shape[1]))


def test_taken_tokens_are_those_at_the_positions():
    tokens = torch.randn(3, 6, 4, generator=generator(15))
    positions = torch.randint(0, 6, (3, 5), generator=generator(16))
    expected = torch.stack([torch.stack([tokens[b, n] for n in row]) for b, row in enumerate(positions.tolist())])
    assert torch.equal(take_positions(tokens, positions), expected)
    strided = tokens.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous() and torch.equal(take_positions(strided, positions), expected)


def test_taken_tokens_are_a_copy():
    tokens = torch.zeros(2, 4, 3)
    take_positions(tokens, torch.tensor([[0, 1, 2, 3]] * 2)).fill_(1)
    assert tokens.abs().max() == 0


def test_the_gradient_goes_back_to_where_a_token_came_from():
    tokens = torch.randn(2, 4, 3, generator=generator(17), dtype=torch.float64).requires_grad_()
    positions = torch.tensor([[3, 0, 3], [1, 2, 0]])
    upstream = torch.randn(2, 3, 3, generator=generator(18), dtype=torch.float64)
    take_positions(tokens, positions).backward(upstream)
    expected = np.zeros((2, 4, 3))
    for b in range(2):
        for k in range(3):
            expected[b, int(positions[b, k])] += upstream[b, k].numpy()
    np.testing.assert_allclose(tokens.grad, expected, rtol=1e-15)
