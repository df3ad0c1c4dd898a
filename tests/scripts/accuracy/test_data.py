"""scripts/accuracy/data.py: even draws, exact noise, and splits that share no row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accuracy.data import collate, draw, load_splits
from accuracy_cases import rows_of
from torch import Tensor

from hf_semckd.errors import ConfigurationError


@pytest.mark.parametrize(("count", "classes"), [(20, 4), (40, 4), (4, 4), (30, 10)])
def test_a_draw_has_as_many_of_each_class(count, classes):
    pool = rows_of([0] * 60 + [place % classes for place in range(200)], classes)
    drawn = draw(pool, count, 0)
    assert len(drawn) == count and drawn.classes == classes
    assert torch.bincount(drawn.columns["labels"], minlength=classes).tolist() == [count // classes] * classes
    assert len(drawn.columns["place"].unique()) == count
    assert torch.equal(drawn.columns["labels"], pool.columns["labels"][drawn.columns["place"]])


def test_a_draw_that_cannot_be_even_is_as_even_as_can_be():
    pool = rows_of([0] * 50 + [1] * 50 + [2] * 3, 3)
    counts = torch.bincount(draw(pool, 22, 0).columns["labels"]).tolist()
    assert counts[2] == 3 and sorted(counts[:2]) in ([9, 10],)
    counts = torch.bincount(draw(rows_of([0, 1, 2] * 10, 3), 10, 0).columns["labels"])
    assert sorted(counts.tolist()) == [3, 3, 4]


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_a_draw_depends_on_the_seed_alone(noise):
    pool = rows_of([place % 5 for place in range(100)], 5)
    first, again, other = (draw(pool, 30, seed, noise) for seed in (3, 3, 4))
    for name in ("place", "labels"):
        assert torch.equal(first.columns[name], again.columns[name])
    assert set(first.columns["place"].tolist()) != set(other.columns["place"].tolist())


@pytest.mark.parametrize("count", [0, 40, 90])
@pytest.mark.parametrize("noise", [0.1, 0.25, 0.4, 0.99])
def test_the_share_of_wrong_labels_is_exact(count, noise):
    pool = rows_of([place % 5 for place in range(100)], 5)
    before = {name: values.clone() for name, values in pool.columns.items()}
    drawn = draw(pool, count, 7, noise)
    right = pool.columns["labels"][drawn.columns["place"]]
    wrong = drawn.columns["labels"] != right
    assert int(wrong.sum()) == round(noise * len(drawn))
    assert drawn.columns["labels"].min() >= 0 and drawn.columns["labels"].max() < 5
    # The same rows come without noise, and those that are not mislabeled are right.
    assert torch.equal(draw(pool, count, 7).columns["place"], drawn.columns["place"])
    assert all(torch.equal(values, before[name]) for name, values in pool.columns.items())


def test_wrong_labels_are_any_of_the_others():
    drawn = draw(rows_of([2] * 3000, 4), 0, 0, 0.99)
    counts = torch.bincount(drawn.columns["labels"], minlength=4).tolist()
    assert counts[2] == 30 and all(900 < count < 1080 for place, count in enumerate(counts) if place != 2)


def test_a_draw_of_zero_takes_all():
    pool = rows_of([0, 0, 1, 2, 2, 2], 3)
    drawn = draw(pool, 0, 0)
    assert sorted(drawn.columns["place"].tolist()) == list(range(6))


def test_rows_are_taken_in_order():
    pool = rows_of([0, 1, 2, 0], 3)
    for indices in ([3, 1], np.array([3, 1]), range(3, 0, -2)):
        taken = pool.take(indices)
        assert taken.columns["place"].tolist() == [3, 1] and taken.columns["labels"].tolist() == [0, 1]
        assert len(taken) == 2 and taken.classes == 3
        assert taken[1] == {"place": torch.tensor(1), "labels": torch.tensor(1)}
    taken.columns["labels"][0] = 2
    assert pool.columns["labels"].tolist() == [0, 1, 2, 0]
    assert len(pool.take([])) == 0


def pixels(rows: Any) -> list[bytes]:
    return [row.numpy().tobytes() for row in rows.columns["pixel_values"]]


@pytest.mark.parametrize("limits", [(), (("test", 60), ("validation", 50)), (("pool", 30), ("validation", 20))])
def test_no_row_is_in_two_splits(limits):
    splits = load_splits("digits", limits)
    named = {"pool": splits.pool, "validation": splits.validation, "test": splits.test}
    seen = [image for rows in named.values() for image in pixels(rows)]
    assert len(seen) == len(set(seen))
    for name, rows in named.items():
        assert len(rows) == dict(limits).get(name, len(rows)) > 0 and rows.classes == 10
        assert rows.columns["pixel_values"].shape[1:] == (1, 8, 8)
        assert rows.columns["labels"].dtype == torch.int64
    assert set(splits.pool.columns["labels"].tolist()) == set(range(10))


def test_a_smaller_test_split_changes_no_other(digits):
    other = load_splits("digits", (("test", 20), ("validation", 50)))
    assert pixels(other.pool) == pixels(digits.pool) and pixels(other.validation) == pixels(digits.validation)
    assert pixels(other.test) == pixels(digits.test)[:20]


def test_unknown_data_is_refused():
    with pytest.raises(ConfigurationError, match="Unknown data"):
        load_splits("mnist")


def test_padding_of_all_rows_is_cut_off():
    def row(tokens: int, theirs: int) -> dict[str, Tensor]:
        mask, their_mask = (torch.arange(8) < tokens).long(), (torch.arange(6) < theirs).long()
        return {
            "input_ids": torch.arange(8) * mask, "attention_mask": mask, "labels": torch.tensor(tokens),
            "teacher_input_ids": torch.arange(6) * their_mask, "teacher_attention_mask": their_mask,
            "pixel_values": torch.zeros(1, 9, 9),
        }  # fmt: skip

    batch = collate([row(3, 1), row(5, 2), row(1, 6)])
    shapes = {name: tuple(values.shape) for name, values in batch.items()}
    assert shapes == {
        "input_ids": (3, 5), "attention_mask": (3, 5), "labels": (3,), "teacher_input_ids": (3, 6),
        "teacher_attention_mask": (3, 6), "pixel_values": (3, 1, 9, 9),
    }  # fmt: skip
    assert batch["input_ids"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 5, 1] and batch["labels"].tolist() == [3, 5, 1]
    assert collate([row(0, 0)])["input_ids"].shape == (1, 1)
