"""The feature loss's parameters in an optimizer that is made, and in one that DeepSpeed will make."""

import torch
from accelerate.utils.deepspeed import DummyOptim
from torch import nn

from hf_semckd.training.optimizer import add_feature_loss_groups


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
