"""teacher/cache/draws.py: drawn tokens as bytes of a row, and rows that cannot be true."""

import math

import pytest
import torch

from hf_semckd.losses.sampled_logits import TokenSampling
from hf_semckd.teacher.cache.draws import are_draws, draw, drawn_logits
from hf_semckd.teacher.cache.rows import RowCheck, with_draws

KEY = bytes(range(20))
SAMPLING = TokenSampling(5, 300, 1.0)


def logits(vocabulary=300, tokens=3):
    return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("vocabulary, size", [(1, 1), (256, 1), (257, 2), (2**16, 2), (2**16 + 1, 3)])
def test_what_is_stored_is_what_was_drawn(vocabulary, size):
    sampling, given = TokenSampling(40, vocabulary, 2.0), logits(vocabulary)
    # The largest id is the most likely one.
    given[:, -1] = 2 * math.log(vocabulary)
    row = draw(given, sampling, KEY)
    assert row["drawn"].shape == (3, 40, size) and row["drawn"].dtype == torch.uint8
    ids, entropy = sampling(given, int.from_bytes(KEY[:8], "big"))
    back = drawn_logits(row["drawn"], row["entropy"])
    assert torch.equal(back.ids, ids) and torch.equal(back.entropy, entropy)
    assert int(back.ids.max()) == vocabulary - 1 and are_draws(row, sampling)


def test_a_key_decides_the_draws_and_the_rest_of_a_row_stays():
    row = {"0.mean": torch.zeros(4), "logits|all": logits()}
    found, again, other = (with_draws(row, SAMPLING, key) for key in (KEY, KEY, KEY[::-1]))
    assert list(found) == ["0.mean", "drawn|all", "entropy|all"] and "logits|all" in row
    assert torch.equal(found["drawn|all"], again["drawn|all"])
    assert not torch.equal(found["drawn|all"], other["drawn|all"])
    assert list(with_draws({"logits": logits()}, SAMPLING, KEY)) == ["drawn", "entropy"]


@pytest.mark.parametrize(
    "changes",
    [
        {"drawn|all": None},
        {"entropy|all": None},
        {"logits|all": torch.zeros(3, 300)},
        {"drawn|all": torch.zeros(3, 4, 2, dtype=torch.uint8)},
        {"drawn|all": torch.zeros(3, 5, 3, dtype=torch.uint8)},
        {"drawn|all": torch.zeros(3, 5, 2, dtype=torch.int32)},
        {"drawn|all": torch.full((3, 5, 2), 255, dtype=torch.uint8)},
        {"drawn|all": torch.zeros(3, 10, dtype=torch.uint8)},
        {"entropy|all": torch.zeros(4)},
        {"entropy|all": torch.zeros(3, dtype=torch.float64)},
        {"entropy|all": torch.tensor([0.0, float("nan"), 0.0])},
    ],
)
def test_rows_that_cannot_be_draws_do_not_fit(changes):
    check = RowCheck(False, 300, (), SAMPLING)
    row = with_draws({"logits|all": logits()}, SAMPLING, KEY)
    assert check.fits(row, 4) and not check.fits(row, 2)
    assert not RowCheck(True, 300, ()).fits(row, 4), "whole logits are expected"
    assert not check.fits({name: value for name, value in {**row, **changes}.items() if value is not None}, 4)
