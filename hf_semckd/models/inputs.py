"""Which entries of a batch a model takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..data.columns import LABEL_COLUMNS, TEACHER_PREFIX
from ..errors import InputError


class InputSelector:
    """Picks out of batches what a model's forward names; the signature is read once.

    A plain module whose only argument has another name (`forward(self, x)`) gets the batch's one tensor under it.

    Args:
        model: The model.

    Attributes:
        parameters: The names that its forward takes, without catch-alls.
    """

    def __init__(self, model: nn.Module):
        self._model = type(model).__name__
        entries = inspect.signature(_plain_forward(model)).parameters.values()
        self._names = {entry.name for entry in entries}
        self.parameters = [
            entry.name for entry in entries if entry.kind not in (entry.VAR_KEYWORD, entry.VAR_POSITIONAL)
        ]
        self._required = [
            entry.name
            for entry in entries
            if entry.default is entry.empty and entry.kind in (entry.POSITIONAL_ONLY, entry.POSITIONAL_OR_KEYWORD)
        ]

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries of a batch that the forward names, without labels.

        Raises:
            InputError: When the model takes nothing of the batch.
        """
        inputs = {
            key: value
            for key, value in batch.items()
            if key not in LABEL_COLUMNS and not key.startswith(TEACHER_PREFIX)
        }
        chosen = {key: value for key, value in inputs.items() if key in self._names}
        if chosen:
            return chosen
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        if len(self._required) == 1 and len(tensors) == 1:
            return {self._required[0]: tensors[0]}
        expected = [name for name in self.parameters if name not in LABEL_COLUMNS]
        raise InputError(
            f"{self._model} takes nothing of the batch",
            received=f"columns {', '.join(map(repr, batch)) or 'none'}",
            expected=f"some of {', '.join(map(repr, expected))}",
            todo="rename the dataset's columns, set remove_unused_columns=False if your collator makes them, "
            "or give the teacher columns of its own named teacher_...",
        )


def select_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of one batch that a model's forward names, without labels; see `InputSelector`."""
    return InputSelector(model)(batch)


def forward_parameters(model: nn.Module) -> list[str]:
    """Return the names that a model's forward takes, without catch-alls."""
    return InputSelector(model).parameters


def _plain_forward(model: nn.Module) -> Any:
    """Return the forward whose signature tells the inputs: that of the base model under PEFT."""
    owner: Any = model
    return owner.get_base_model().forward if hasattr(owner, "get_base_model") else owner.forward
