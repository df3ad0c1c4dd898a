"""scripts/accuracy/models.py: a hand count of accuracy, and models that depend on the seed alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accuracy.models import accuracy, make_model, teacher_rows
from accuracy_cases import STUDENT, rows_of
from torch import Tensor, nn


class Parity(nn.Module):
    """Says 1 for odd places, 0 for even ones, and counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, place: Tensor) -> Any:
        assert not self.training and not torch.is_grad_enabled()
        self.sizes.append(len(place))
        return SimpleNamespace(logits=torch.nn.functional.one_hot(place % 2, 3).float())


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 500])
def test_accuracy_against_a_hand_count(batch_size):
    # Places 0 to 6 are answered 0 1 0 1 0 1 0: right are the first, third, fourth and seventh.
    rows, model = rows_of([0, 0, 0, 1, 2, 2, 0], 3), Parity()
    rows.columns["teacher_place"] = torch.full((7,), -1)
    assert accuracy(model, rows, batch_size) == pytest.approx(4 / 7)
    assert sum(model.sizes) == 7 and max(model.sizes) <= batch_size


def test_equal_seeds_make_equal_models(digits):
    first, again, other = (make_model(STUDENT, digits.pool, seed) for seed in (1, 1, 2))
    states = [list(model.state_dict().values()) for model in (first, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))
    assert first.config.num_channels == 1 and first.config.num_labels == 10


def test_a_teacher_sees_its_own_columns():
    rows = rows_of([0, 1], 2)
    assert teacher_rows(rows) is rows
    rows.columns["teacher_place"] = torch.tensor([5, 6])
    own = teacher_rows(rows)
    assert own.columns["place"].tolist() == [5, 6] and rows.columns["place"].tolist() == [0, 1]
