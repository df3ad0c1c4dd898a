"""teacher/cache/rows.py: which stored rows can be a teacher's."""

import pytest
import torch

from hf_semckd.teacher.cache.rows import RowCheck, is_alike

CHECK = RowCheck(logits=True, classes=5, channels=(8, 6))
ROW = {
    "logits|all": torch.zeros(3, 5),
    "0.tokens.0|chosen": torch.zeros(2, 8),
    "0.positions|chosen": torch.zeros(2, dtype=torch.long),
    "1.grid": torch.zeros(6, 2, 2),
    "1.summary": torch.zeros(11),
    "mask|all": torch.zeros(3),
}


def test_a_row_of_this_teacher_fits():
    assert CHECK.fits(ROW, 4)
    assert RowCheck(True, None, ()).fits({"logits": torch.tensor(1.0)}, None)
    assert CHECK.fits({f"1/{name}" if name != "logits|all" else name: value for name, value in ROW.items()}, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"logits|all": None},
        {"logits|all": torch.zeros(3, 7)},
        {"logits|all": torch.zeros(9, 5)},
        {"0.tokens.0|chosen": torch.zeros(2, 7)},
        {"0.tokens.0|chosen": torch.zeros(2, 8, dtype=torch.long)},
        {"0.positions|chosen": torch.zeros(2, 2)},
        {"2.mean": torch.zeros(8)},
        {"-1.mean": torch.zeros(8)},
        {"1.other": torch.zeros(6)},
        {"anything": torch.zeros(6)},
        {"mask|all": torch.zeros(3, 3)},
    ],
)
def test_any_other_row_does_not(changes):
    row = {name: value for name, value in {**ROW, **changes}.items() if value is not None}
    assert not CHECK.fits(row, 4)


def test_rows_that_make_a_batch_are_alike_but_for_what_is_cut():
    longer = {**ROW, "logits|all": torch.zeros(4, 5)}
    assert is_alike(ROW, longer)
    assert not is_alike(ROW, {**ROW, "1.grid": torch.zeros(6, 3, 3)})
    assert not is_alike(ROW, {**ROW, "1.grid": torch.zeros(6, 2, 2).half()})
    assert not is_alike(ROW, {name: value for name, value in ROW.items() if name != "mask|all"})
