"""Which entries of a batch go to the student, and which to the teacher alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..data.columns import CACHED, LABEL_COLUMNS, TEACHER_PREFIX
from ..models.inputs import InputSelector, forward_parameters


class InputRouter:
    """Takes the teacher's entries out of the student's batches, and keeps them in the data set's columns."""

    def __init__(self, student: nn.Module, teacher: nn.Module):
        self._select = InputSelector(student)
        self._teacher_takes = forward_parameters(teacher)
        self._teacher_only = {*self._teacher_takes} - {*self._select.parameters, *LABEL_COLUMNS}
        self._pretrained = isinstance(student, PreTrainedModel)
        self._named_inputs = self._pretrained or hasattr(student, "get_base_model")

    def student_takes(self, name: str) -> bool:
        """Whether the student's forward has an argument of this name."""
        return name in self._select.parameters

    def student_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the student gets of a batch: not the teacher's columns, nor those only the teacher names."""
        own = {
            key: value
            for key, value in batch.items()
            if key not in self._teacher_only and key != CACHED and not key.startswith(TEACHER_PREFIX)
        }
        if self._named_inputs:
            return own
        # A plain module's one input may have any name, also one that the teacher alone knows.
        labels = {key: value for key, value in batch.items() if key in LABEL_COLUMNS}
        return {**self._select(batch), **labels}

    def extra_columns(self, kept: Sequence[str], columns: Sequence[str]) -> list[str]:
        """Return which of a data set's columns must stay besides those kept by `Trainer` for the student."""
        extra = [name for name in self._teacher_takes if name not in kept]
        extra += [name for name in columns if name.startswith(TEACHER_PREFIX)]
        if not self._pretrained and not {*kept} & {*columns}:
            extra += columns
        return extra
