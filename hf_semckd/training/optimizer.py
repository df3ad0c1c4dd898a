"""The feature loss's parameters in the student's optimizer, for the time of training."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils.deepspeed import DummyOptim
from torch import nn

# Lists that a scheduler keeps in step with the optimizer's groups.
_SCHEDULER_LISTS = ("base_lrs", "lr_lambdas", "min_lrs", "max_lrs", "_last_lr")
# What torch's optimizers keep of a parameter, in its shape.
_MOMENTS = ("exp_avg", "momentum_buffer", "square_avg")


def add_feature_loss_groups(
    optimizer: torch.optim.Optimizer | DummyOptim, loss: nn.Module, *, learning_rate: float, weight_decay: float
) -> None:
    """Append the feature loss's parameters to the student's optimizer, unless they are in it already.

    Where DeepSpeed's configuration names the optimizer, there is only a list of parameters yet: it becomes groups.

    Args:
        learning_rate: Peak learning rate of the new groups; the schedule multiplies it as it does the student's.
        weight_decay: For matrices; vectors and scalars have none, as usual.
    """
    if not isinstance(optimizer, DummyOptim):
        for group in _groups(_missing_parameters(optimizer, loss), learning_rate, weight_decay):
            optimizer.add_param_group(group)
        return
    if any(isinstance(entry, dict) for entry in optimizer.params):
        return
    own = {id(parameter) for parameter in loss.parameters()}
    students = [parameter for parameter in optimizer.params if id(parameter) not in own]
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    optimizer.params = [{"params": students}, *_groups(trained, learning_rate, weight_decay)]


class BorrowedOptimizer:
    """An optimizer (and scheduler, or None) that the user made: one more group while training, its own again after.

    The new group copies the first group's settings, learning rate and schedule included.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any, loss: nn.Module):
        self.optimizer = optimizer
        self._groups = len(optimizer.param_groups)
        self._lists: list[tuple[Any, str]] = []
        members = _missing_parameters(optimizer, loss)
        if members:
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


def difference(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return what a saved state is of and what this optimizer needs, in words; None where it can take the state.

    Torch would take the state of another kind of optimizer, and fail in the first step.
    """
    groups, old = optimizer.param_groups, saved["param_groups"]
    sizes, old_sizes = ([len(group["params"]) for group in side] for side in (groups, old))
    if sizes != old_sizes:
        return _counted(old_sizes), _counted(sizes)
    inner = getattr(optimizer, "optimizer", optimizer)
    kind = type(inner).__name__
    pairs = list(zip(groups, old, strict=True))
    # Flags are what versions of torch add; the scheduler adds the initial rate.
    numbers = {name for group, _ in pairs for name, value in group.items() if _is_number(value)} - {"initial_lr"}
    lost = sorted(name for name in numbers if any(name in now and name not in then for now, then in pairs))
    if lost:
        return f"the state of an optimizer without {', '.join(lost)}", f"that of {kind}, which has them"
    if not type(inner).__module__.startswith("torch.optim"):
        return None  # others may keep their moments in other shapes
    for now, then in pairs:
        for parameter, key in zip(now["params"], then["params"], strict=True):
            state = saved["state"].get(key, {})
            shapes = {tuple(state[name].shape) for name in _MOMENTS if torch.is_tensor(state.get(name))}
            if shapes - {tuple(parameter.shape)}:
                return f"moments of shape {min(shapes)}", f"{tuple(parameter.shape)} in the same place"
    return None


def _counted(sizes: Sequence[int]) -> str:
    return f"parameter groups of {', '.join(map(str, sizes))} parameters"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, tuple)) and not isinstance(value, bool)


def _missing_parameters(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[nn.Parameter]:
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [entry for entry in module.parameters() if entry.requires_grad and id(entry) not in known]


def _groups(members: Sequence[nn.Parameter], learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in members if parameter.dim() > 1]
    others = [parameter for parameter in members if parameter.dim() <= 1]
    return [
        {"params": entries, "lr": learning_rate, "weight_decay": decay}
        for entries, decay in ((matrices, weight_decay), (others, 0.0))
        if entries
    ]
