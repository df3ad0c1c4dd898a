"""The host never waits for the device outside logging steps, shown on the CPU by what is asked of tensors."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import Samples, bert, texts
from matrix.tasks import TASKS
from tiny import PROBLEMS, Outcome, Problem, assert_same, fit, make, outcome
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForQuestionAnswering, TrainerCallback

import hf_semckd
from hf_semckd.data import batches
from hf_semckd.training.arriving import Arriving
from hf_semckd.training.counts import count_items

LIBRARY = str(Path(hf_semckd.__file__).parent)
TORCH = str(Path(torch.__file__).parent)
# What the host has to wait for: a value, a size that depends on values, or the end of a copy from pageable memory.
WAITING_OPERATIONS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
}
WAITING_FUNCTIONS = {
    "__bool__",
    "__contains__",
    "__float__",
    "__index__",
    "__int__",
    "allclose",
    "as_tensor",
    "cpu",
    "item",
    "new_tensor",
    "numpy",
    "tensor",
    "tolist",
}


class WaitingError(AssertionError):
    """The library waited for the device."""


def _check(name: str) -> None:
    """Fail when the innermost frame that is neither torch's nor this file's belongs to the library."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith((TORCH, __file__)):
        frame = frame.f_back
    # What is read there was sent to the host in the step before, or has not been sent to the device yet.
    arrived = frame is not None and (
        frame.f_code is Arriving.read.__code__ or frame.f_code.co_filename == batches.__file__
    )
    if frame is not None and frame.f_code.co_filename.startswith(LIBRARY) and not arrived:
        raise WaitingError(f"{name} in {frame.f_code.co_filename}:{frame.f_lineno}")


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITING_OPERATIONS or by_mask:
            _check(name)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in WAITING_FUNCTIONS:
            _check(name)
        return func(*args, **(kwargs or {}))


class _Watch(TrainerCallback):
    """Watches from the end of the first step, which takes the statistics, to that of the last, which logs."""

    def __init__(self) -> None:
        self.modes: list[Any] = []
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.modes = [_Operations(), _Functions()]
            for mode in self.modes:
                mode.__enter__()
        self.steps += 1
        if state.global_step == state.max_steps:
            self.stop()

    def stop(self) -> None:
        while self.modes:
            self.modes.pop().__exit__(None, None, None)


def train_watched(problem: str | Problem, folder: Any, **changes: Any) -> tuple[Outcome, int]:
    trainer = make(problem, folder, samples=24, logging_strategy="no", **changes)
    trainer.distillation.guard.deferred = True
    watch = _Watch()
    trainer.add_callback(watch)
    try:
        fit(trainer)
    finally:
        watch.stop()
    return outcome(trainer), watch.steps


CUT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("association", ["similarity", "learned", "uniform"])
@pytest.mark.parametrize("problem", ["vit", "resnet_vit", "sentences", "tokens", "next_word"])
def test_no_step_waits(problem: str, association: str, tmp_path: Path) -> None:
    _, steps = train_watched(problem, tmp_path, association=association, **CUT)
    assert steps == 3


@pytest.mark.parametrize(
    "problem",
    ["several_labels", "regression", "masked_words", "smoothed_tokens", "smoothed_next_word"],
)
def test_no_other_kind_of_head_waits(problem: str, tmp_path: Path) -> None:
    train_watched(problem, tmp_path, **CUT)


def answers(count: int) -> Samples:
    """Return texts with answers, of which some are outside."""
    rows = texts(count, types=False, labels=None).rows
    return Samples([{**row, "start_positions": n % 12, "end_positions": n % 13} for n, row in enumerate(rows)])


READER = partial(bert, labels=2, head=BertForQuestionAnswering)
PIXELS = TASKS["segmentation"]
OWN_LOSSES = {
    "answers": Problem(READER, partial(READER, layers=3, width=24, seed=9), answers),
    "pixels": Problem(PIXELS.student_model, PIXELS.teacher_model, lambda count: Samples(PIXELS.rows() * (count // 8))),
}


@pytest.mark.parametrize("problem", OWN_LOSSES)
def test_no_loss_that_counts_in_its_own_way_waits(problem: str, tmp_path: Path) -> None:
    train_watched(OWN_LOSSES[problem], tmp_path, **CUT)


def test_unlabeled_text_does_not_wait(tmp_path: Path) -> None:
    train_watched("unlabeled_words", tmp_path, terms="logit", **CUT)


def test_a_teacher_that_is_cut_short_does_not_wait(tmp_path: Path) -> None:
    train_watched("sentences", tmp_path, terms="feature", teacher_layers=[1, 2], **CUT)


@pytest.mark.parametrize(
    "waiting",
    [
        lambda labels: bool((labels != -100).any()),
        lambda labels: labels.sum().item(),
        lambda labels: labels[labels != -100],
        lambda labels: (labels != -100).nonzero(),
        lambda labels: labels.tolist(),
        lambda labels: torch.tensor(3.0),
    ],
)
def test_the_watch_sees_who_waits(waiting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same expression, as if it stood in the library."""
    plain = count_items
    code = waiting.__code__.replace(co_filename=f"{LIBRARY}/training/counts.py")
    guilty = type(waiting)(code, {"torch": torch})

    def count(batch: Any, *others: Any) -> Any:
        guilty(batch["labels"])
        return plain(batch, *others)

    monkeypatch.setattr("hf_semckd.training.counts.count_items", count)
    with pytest.raises(WaitingError, match="counts.py"):
        train_watched("tokens", tmp_path, **CUT)


@pytest.mark.parametrize("problem", ["vit", "tokens"])
def test_looking_later_changes_no_number(problem: str, tmp_path: Path) -> None:
    outcomes = []
    for later in (False, True):
        trainer = make(problem, tmp_path, **CUT)
        trainer.distillation.guard.deferred = later
        fit(trainer)
        outcomes.append(outcome(trainer))
    assert_same(*outcomes, PROBLEMS[problem].tolerance)
