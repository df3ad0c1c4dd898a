"""The calibration's parameters in the student's optimizer, for the time of training."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ..losses import FeatureLoss

logger = logging.getLogger(__name__)
# Lists that a scheduler keeps in step with the optimizer's groups.
_SCHEDULER_LISTS = ("base_lrs", "lr_lambdas", "min_lrs", "max_lrs", "_last_lr")


def add_feature_loss_groups(
    optimizer: torch.optim.Optimizer, loss: FeatureLoss, *, learning_rate: float, weight_decay: float
) -> None:
    """Append the feature loss's parameters to an optimizer, unless they are in it already.

    Args:
        optimizer: The student's optimizer.
        loss: The feature loss.
        learning_rate: Peak learning rate of the new groups; the schedule multiplies it as it does the student's.
        weight_decay: For matrices; vectors and scalars have none, as usual.
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    fresh = [parameter for parameter in loss.parameters() if parameter.requires_grad and id(parameter) not in known]
    for decayed in (True, False):
        members = [parameter for parameter in fresh if (parameter.dim() > 1) is decayed]
        if members:
            decay = weight_decay if decayed else 0.0
            optimizer.add_param_group({"params": members, "lr": learning_rate, "weight_decay": decay})


class BorrowedOptimizer:
    """An optimizer (and scheduler) that the user made: one more group while training, and its own again after.

    The new group copies the first group's settings, learning rate and schedule included.

    Args:
        optimizer: The user's optimizer.
        scheduler: The user's scheduler of it, or None.
        module: Whose parameters are added.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any, module: nn.Module):
        self.optimizer = optimizer
        self.scheduler = scheduler
        self._groups = len(optimizer.param_groups)
        self._lists: list[tuple[Any, str]] = []
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        members = [parameter for parameter in module.parameters() if id(parameter) not in known]
        if not members:
            return
        settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        optimizer.add_param_group({**settings, "params": members})
        self._extend(scheduler)

    def give_back(self) -> None:
        """Remove the group and its state again."""
        for group in self.optimizer.param_groups[self._groups :]:
            for parameter in group["params"]:
                self.optimizer.state.pop(parameter, None)
        del self.optimizer.param_groups[self._groups :]
        for owner, name in self._lists:
            # Looked up again: a scheduler makes some of its lists anew at every step.
            del getattr(owner, name)[self._groups :]

    def _extend(self, scheduler: Any) -> None:
        for name in _SCHEDULER_LISTS:
            values = getattr(scheduler, name, None)
            if isinstance(values, list) and len(values) == self._groups:
                self._lists.append((scheduler, name))
                values.append(values[0])
        for inner in getattr(scheduler, "_schedulers", ()):
            self._extend(inner)
