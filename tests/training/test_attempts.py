"""`auto_find_batch_size`: what a training that runs out of memory becomes is the training that began smaller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from makers import assert_same_weights, distiller, weights
from tiny import assert_same, fit, make, outcome
from torch import nn
from transformers import TrainerCallback, TrainerState

from hf_semckd.training.checkpoint import recorded_arguments

LOGGER = "hf_semckd.training.attempts"
LIMIT = 4
LARGE = {"per_device_train_batch_size": 6, "auto_find_batch_size": True}
SMALL = {"per_device_train_batch_size": LIMIT}


class Shortage:
    """Raises what an allocator does when a student in training gets more samples than it has room for."""

    def __init__(self, student: nn.Module, kind: type[RuntimeError] = torch.OutOfMemoryError, after: int = 0):
        self.kind, self.after = kind, after
        self.sizes: list[int] = []
        student.register_forward_hook(self, with_kwargs=True)

    def __call__(self, student: nn.Module, args: Any, keywords: dict[str, Any], output: Any) -> None:
        """Raise after the forward: batch normalization has counted the batch by then."""
        if student.training:
            self.sizes.append(len(next(value for value in keywords.values() if isinstance(value, torch.Tensor))))
            if self.sizes[-1] > LIMIT and len(self.sizes) > self.after:
                raise self.kind("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("problem", "kind", "changes"),
    [
        ("vit", torch.OutOfMemoryError, {"association": "learned", "association_bank": 16}),
        ("sentences", RuntimeError, {"optim": "adamw_torch", "gradient_accumulation_steps": 2}),
        ("resnet", torch.OutOfMemoryError, {}),
    ],
)
def test_what_does_not_fit_becomes_the_run_of_the_size_that_does(problem, kind, changes, tmp_path, caplog):
    trainer = make(problem, tmp_path, samples=12, **changes, **LARGE)
    shortage, before = Shortage(trainer.student, kind), type(trainer.student)
    fit(trainer)
    expected = make(problem, tmp_path, samples=12, **changes, **SMALL)
    fit(expected)
    assert shortage.sizes[:3] == [6, 5, 4] and set(shortage.sizes[2:]) == {4}
    assert_same(outcome(trainer), outcome(expected), 0.0)
    assert trainer.state.global_step == expected.state.global_step
    assert (
        type(trainer.student) is before and trainer.student.state_dict().keys() == expected.student.state_dict().keys()
    )
    groups = [[len(group["params"]) for group in made.optimizer.param_groups] for made in (trainer, expected)]
    assert groups[0] == groups[1]
    told = [record.message for record in caplog.records if record.name == LOGGER]
    assert [message.split()[-1] for message in told] == ["5.", "4."]


class Look(TrainerCallback):
    """Notes the state of the feature loss at the beginning of each attempt."""

    def __init__(self, loss: nn.Module):
        self.loss = loss
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, *args: Any, **keywords: Any) -> None:
        self.seen.append(weights(self.loss))


def test_what_was_learned_before_stays_with_all_that_was_observed(tmp_path, caplog):
    trainer = make("vit", tmp_path, samples=12, **LARGE)
    Shortage(trainer.student, after=1)
    look = Look(trainer.feature_loss)
    trainer.add_callback(look)
    fit(trainer)
    first, second, third = look.seen
    assert first["statistics.0.count"] == 0 < second["statistics.0.count"]
    trained = [name for name, _ in trainer.feature_loss.named_parameters()]
    assert trained and not any(torch.equal(first[name], second[name]) for name in trained)
    # The second attempt has learned nothing, so the third begins as it did.
    assert_same_weights(second, third)
    assert trainer.state.global_step == 3, "steps are counted anew"
    assert ["learned" in record.message for record in caplog.records if record.name == LOGGER] == [True, False]


def test_the_record_tells_the_batch_size_that_was_found(tmp_path):
    args = distiller(tmp_path, LARGE).args
    told = recorded_arguments(args, TrainerState(train_batch_size=LIMIT))
    assert (told["per_device_train_batch_size"], told["total_train_batch_size"]) == (LIMIT, LIMIT)
    args.auto_find_batch_size = False
    assert recorded_arguments(args, TrainerState(train_batch_size=LIMIT))["total_train_batch_size"] == 6
