"""What stops a student that is not finite, in one process and in several; losses are in `tests/faults`."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_semckd.errors import NonFiniteLossError
from hf_semckd.training.guard import in_any_process, refuse_non_finite


def several(elsewhere: float) -> Any:
    """Stand in for the accelerator of several processes, of which so many others have found something."""
    return SimpleNamespace(device=torch.device("cpu"), reduce=lambda value, reduction: value + elsewhere)


def student() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].register_buffer("mask", torch.full((2,), float("-inf")), persistent=False)
    return model


def broken() -> nn.Module:
    model = student()
    model[1].running_mean.fill_(float("inf"))
    return model


def test_all_processes_get_the_same_answer():
    assert in_any_process(True, several(0)) and in_any_process(False, several(1))
    assert not in_any_process(False, several(0))
    alone = Accelerator(cpu=True)
    assert in_any_process(True, alone) and not in_any_process(False, alone)


def test_a_finite_student_passes_unless_that_of_another_process_is_not():
    refuse_non_finite(student(), 3)
    refuse_non_finite(student(), 3, several(0))
    with pytest.raises(NonFiniteLossError, match="the student of another process"):
        refuse_non_finite(student(), 3, several(1))


def test_a_broken_one_is_refused_by_name_and_its_buffers_only_where_they_are_saved():
    for accelerator in (None, several(0), several(1)):
        with pytest.raises(NonFiniteLossError, match=r"after step 3(.|\n)*infinity in 1\.running_mean\n"):
            refuse_non_finite(broken(), 3, accelerator)
    refuse_non_finite(broken(), 3, buffers=False)
    model = student()
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"0\.weight"):
        refuse_non_finite(model, 3, buffers=False)
