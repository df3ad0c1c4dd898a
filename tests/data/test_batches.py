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
        {"labels": torch.tensor([[[0, 2]], [[-100, 2]]])},
        {"labels": torch.tensor([[[0.5]], [[7.5]]])},
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
        ({"labels": torch.tensor([0, 2], dtype=torch.int32)}, "(?s)`labels`: int32.*make labels int64"),
        ({"labels": torch.tensor([[0, 7], [1, 1]], dtype=torch.uint8)}, "(?s)`labels`: uint8.*make labels int64"),
        ({"labels": torch.tensor([0, 2], dtype=torch.int16)}, "(?s)`labels`: int16.*make labels int64"),
        ({"labels": torch.tensor([True, False])}, "(?s)`labels`: bool.*make labels int64"),
        ({"labels": torch.tensor([0.0, 2.0])}, "(?s)`labels`: float32.*make labels int64"),
        (
            {"labels": torch.tensor([[[0]], [[255]]])},
            "(?s)does not ignore.*255 in row 1.*or -100.*replace 255 by -100",
        ),
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


@pytest.mark.parametrize(("value", "place"), [(-100, 0), (7, 1)])
def test_pixels_have_a_label_of_their_own_that_does_not_count(value, place):
    check = BatchCheck(labels=("labels",), limits={"labels": 3}, ignored=(255,), ignored_field="ignores")
    check(batch(labels=torch.tensor([[[0, 255]], [[255, 2]]])))
    labels = torch.tensor([[[0, 1]], [[2, 2]]])
    labels[place, 0, 1] = value
    advice = "replace -100 by 255, or set student.config.ignores=-100" if value < 0 else "num_labels"
    with pytest.raises(InputError, match=f"(?s)`labels`: {value} in row {place}.*0 to 2, or 255.*{advice}"):
        check(batch(labels=labels))


def test_token_types_are_told_from_words():
    check = BatchCheck(frozenset({"token_type_ids"}), limits={"token_type_ids": 1})
    check(batch(token_type_ids=torch.zeros(2, 3, dtype=torch.long)))
    with pytest.raises(InputError, match="(?s)`token_type_ids`: 1 in row 1.*return_token_type_ids=False"):
        check(batch(token_type_ids=torch.tensor([[0, 0], [0, 1]])))


def objects(**changes):
    whole = {"class_labels": torch.tensor([0, 2]), "boxes": torch.full((2, 4), 0.5)}
    return {name: value for name, value in {**whole, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (None, "None in row 1"),
        (objects(boxes=None), "no tensor `boxes` in row 1"),
        (objects(class_labels=[0, 2]), "no tensor `class_labels` in row 1"),
        (objects(class_labels=torch.tensor([0, 3])), "class 3 in row 1"),
        (objects(class_labels=torch.tensor([0, -1])), "class -1 in row 1"),
        (objects(class_labels=torch.tensor([0, 1, 2])), r"class_labels \(3,\) and boxes \(2, 4\) in row 1"),
        (objects(class_labels=torch.tensor([0.0, 1.0])), "class_labels of float32"),
        (objects(boxes=torch.full((2, 4), float("nan"))), "NaN or infinity in row 1"),
        (objects(boxes=torch.tensor([[0.5] * 4, [0.5, 0.5, -0.1, 0.5]])), "negative size in row 1"),
    ],
)
def test_objects_that_no_detector_can_learn_are_refused(entry, words):
    check = BatchCheck(labels=("labels",), limits={"labels": 3})
    nothing = objects(class_labels=torch.zeros(0, dtype=torch.long), boxes=torch.zeros(0, 4))
    check(batch(labels=[objects(), nothing]))
    with pytest.raises(InputError, match=f"(?s)`labels`: .*{words}"):
        check(batch(labels=[objects(), entry]))


def test_where_no_labels_are_needed_all_samples_have_them_or_none():
    check = BatchCheck(labels=("labels",), limits={"labels": 3}, needs_labels=False)
    collator = CheckedCollator(default_data_collator, check)
    collator([{"x": [1.0]}, {"x": [2.0]}])
    with pytest.raises(InputError, match="`labels` is None, or holds None, in row 0"):
        collator([{"x": [1.0], "labels": None}, {"x": [2.0], "labels": 1}])


def test_one_of_two_label_columns_is_missed():
    check = BatchCheck(labels=("start", "end"))
    with pytest.raises(InputError, match="`end` is None, or holds None, in row 0"):
        CheckedCollator(default_data_collator, check)([{"start": 1, "end": None}, {"start": 1, "end": 2}])


def test_a_stream_without_a_sample_says_so():
    with pytest.raises(InputError, match="(?s)no sample.*the stream ended before its first one"):
        collate(default_data_collator, [])
