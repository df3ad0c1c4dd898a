"""data/batches.py: what no step can be taken on is refused by column and row, and nothing else is."""

import pytest
import torch
from transformers import default_data_collator

from hf_semckd.data.batches import BatchCheck, CheckedCollator, collate, find_gap
from hf_semckd.errors import InputError

CHECK = BatchCheck(frozenset({"x", "ids"}), ("labels",), {"ids": 9, "labels": 3}, {"ids": 4})


def batch(**changes):
    whole = {"x": torch.ones(2, 3), "ids": torch.tensor([[1, 8], [0, 2]]), "labels": torch.tensor([2, -100])}
    return {name: value for name, value in {**whole, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"other": torch.tensor([float("nan")])},
        {"x": torch.full((2, 3), 3e38)},
        {"attention_mask": torch.tensor([[0.0, -float("inf")]])},
        {"labels": torch.tensor([[[0, 255]], [[-100, 2]]])},
        {"labels": torch.tensor([0.5, 7.5])},
        {"ids": torch.empty(2, 0, dtype=torch.long)},
        {"x": None},
    ],
)
def test_what_can_be_learned_from_is_let_through(changes):
    CHECK(batch(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.tensor([[1.0], [float("nan")]])}, "`x`: NaN or infinity in row 1"),
        ({"x": torch.tensor([[float("inf")], [-float("inf")]])}, "`x`: NaN or infinity in row 0"),
        ({"ids": torch.tensor([[1, 2], [3, 9]])}, "`ids`: 9 in row 1"),
        ({"ids": torch.tensor([[-1, 2]])}, "`ids`: -1 in row 0"),
        ({"ids": torch.ones(2, 5, dtype=torch.long)}, "`ids`: 5 tokens"),
        ({"labels": torch.tensor([0, 3])}, "`labels`: 3 in row 1"),
        ({"labels": torch.tensor([255, 0])}, "`labels`: 255 in row 0"),
        ({"labels": torch.tensor([0.0, float("nan")])}, "`labels`: NaN or infinity in row 1"),
        ({"labels": None}, "no labels"),
    ],
)
def test_what_would_break_a_step_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        CHECK(batch(**changes))


@pytest.mark.parametrize("made", [{}, None, [], {"x": torch.zeros(0, 3)}, {"x": [1, 2]}])
def test_a_batch_without_a_value_is_refused(made):
    with pytest.raises(InputError, match="empty batch"):
        CheckedCollator(lambda samples: made, CHECK)([{"x": 1}])


def test_a_column_that_the_collator_dropped_without_a_word_is_found():
    samples = [{"x": [1.0], "labels": None}, {"x": [2.0], "labels": 1}]
    with pytest.raises(InputError, match="`labels` is None, or holds None, in row 0"):
        CheckedCollator(default_data_collator, CHECK)(samples)
    with pytest.raises(InputError, match="row 0 of the batch has no `x`"):
        CheckedCollator(default_data_collator, CHECK)([{"labels": 1}, {"x": [2.0], "labels": 1}])
    # Without labels in the plan nobody misses them.
    CheckedCollator(default_data_collator, BatchCheck(frozenset({"x"})))(samples)


def test_a_failing_collator_is_told_with_what_differs():
    with pytest.raises(InputError, match=r"`x` has the shape \(2,\) in row 0 of the batch and \(1,\) in row 1"):
        collate(default_data_collator, [{"x": [1, 2]}, {"x": [1]}])
    with pytest.raises(InputError, match="`x` is None, or holds None, in row 1"):
        collate(default_data_collator, [{"x": [1, 2]}, {"x": [1, None]}])
    assert find_gap([(1, 2)]) is None and find_gap([]) is None and find_gap([{"x": 1}, {"x": 2}]) is None
