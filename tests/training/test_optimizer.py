"""The feature loss's parameters in an optimizer that is made, and in one that DeepSpeed will make."""

import copy
from typing import Any

import torch
from accelerate.utils.deepspeed import DummyOptim
from torch import nn

from hf_semckd.training.optimizer import add_feature_loss_groups, difference


def parts() -> tuple[nn.Module, nn.Module]:
    return nn.Linear(3, 2), nn.Linear(4, 5)


def test_parameters_that_deepspeed_will_train_become_groups_with_their_own_rates():
    student, loss = parts()
    optimizer = DummyOptim(params=[*student.parameters(), *loss.parameters()])
    for _ in range(2):  # Trainer asks twice.
        add_feature_loss_groups(optimizer, loss, learning_rate=0.1, weight_decay=0.01)
    first, matrices, vectors = optimizer.params
    assert [id(entry) for entry in first["params"]] == [id(entry) for entry in student.parameters()]
    assert first.keys() == {"params"}
    assert (matrices["params"], matrices["lr"], matrices["weight_decay"]) == ([loss.weight], 0.1, 0.01)
    assert (vectors["params"], vectors["lr"], vectors["weight_decay"]) == ([loss.bias], 0.1, 0.0)


def test_an_optimizer_that_is_made_gets_the_same_groups_once():
    student, loss = parts()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    for _ in range(2):
        add_feature_loss_groups(optimizer, loss, learning_rate=0.1, weight_decay=0.01)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.5, 0.0),
        (0.1, 0.01),
        (0.1, 0.0),
    ]


def stepped(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state after one step with gradients of ones, as a checkpoint holds it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


def test_a_state_of_the_same_kind_is_taken():
    for kind in (torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad):
        first, second = (kind(part.parameters(), lr=0.1) for part in parts()[:1] * 2)
        saved = stepped(first)
        assert difference(second, saved) is None
        # Another rate, and flags that a version of torch does not know yet.
        group = saved["param_groups"][0]
        group["lr"] = 3.0
        for flag in [name for name, value in group.items() if isinstance(value, bool) or value is None]:
            del group[flag]
        assert difference(second, saved) is None


def test_a_state_of_another_kind_or_size_is_not():
    student, loss = parts()
    sgd, adam = torch.optim.SGD(student.parameters(), lr=0.1), torch.optim.AdamW(student.parameters(), lr=0.1)
    found = difference(sgd, stepped(adam))
    assert found is not None and "without dampening, momentum" in found[0] and "SGD" in found[1]
    found = difference(adam, stepped(sgd))
    assert found is not None and "without betas, eps" in found[0] and "AdamW" in found[1]
    two = torch.optim.AdamW([{"params": student.parameters()}, {"params": [loss.weight]}], lr=0.1)
    assert difference(two, stepped(adam)) == (
        "parameter groups of 2 parameters",
        "parameter groups of 2, 1 parameters",
    )
    found = difference(torch.optim.AdamW(loss.parameters(), lr=0.1), stepped(adam))
    assert found == ("moments of shape (2, 3)", "(5, 4) in the same place")
