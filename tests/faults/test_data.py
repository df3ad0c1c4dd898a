"""Broken rows, labels, models: an error of the library's that names the place, before the step is taken on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fault_counts import ENDED
from makers import assert_same_weights, bert, bert_tokens, distiller, gpt2, images, resnet, texts, vit, weights
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, default_data_collator

from hf_semckd.errors import InputError, NonFiniteLossError, TeacherOutputError

pytestmark = pytest.mark.faults
NAN, INFINITE = float("nan"), float("inf")
# Rows that a dry run of the first ones does not meet.
LATE = 9
PARTS = {
    "images": lambda: {"model": vit(), "teacher_model": vit(3, 24, seed=9), "train_dataset": images(24)},
    "texts": lambda: {"model": bert(), "teacher_model": bert(3, 24, seed=9), "train_dataset": texts(24)},
    "tokens": lambda: {
        "model": bert_tokens(),
        "teacher_model": bert_tokens(layers=3, width=24, seed=9),
        "train_dataset": texts(24, labels="token"),
    },
    "words": lambda: {
        "model": gpt2(),
        "teacher_model": gpt2(3, 24, seed=9),
        "train_dataset": texts(24, labels="input", types=False),
    },
    "numbers": lambda: {
        "model": vit(labels=1),
        "teacher_model": vit(3, 24, seed=9, labels=1),
        "train_dataset": scored(24),
    },
}


def scored(count: int) -> Any:
    """Return pictures with a number each."""
    data = images(count)
    for row in data.rows:
        row["labels"] = float(row["labels"])
    return data


class Remember(TrainerCallback):
    """Keeps a copy of the student's weights after each step."""

    def __init__(self) -> None:
        self.last: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.last = weights(model)


def train(folder: Any, problem: str, damage: Any, collator: Any = None, args: Any = None) -> Any:
    """Train with a damaged data set; return the student's weights after its last whole step, and what they are now."""
    parts, remember = PARTS[problem](), Remember()
    damage(parts["train_dataset"].rows)
    settings = {"max_steps": 12, **(args or {})}
    trainer = distiller(folder, settings, **parts, data_collator=collator, callbacks=[remember])
    start = weights(trainer.student)
    try:
        trainer.train()
    finally:
        # No step was taken on it, and nothing else has touched the student.
        assert_same_weights(remember.last or start, weights(trainer.student))
    return trainer


def put(column: str, value: Any, row: int = LATE) -> Any:
    """Return a damage: another value in a row."""

    def damage(rows: list[dict[str, Any]]) -> None:
        rows[row][column] = value

    return damage


def place(column: str, value: Any, row: int = LATE) -> Any:
    """Return a damage: another number within the tensor of a row."""

    def damage(rows: list[dict[str, Any]]) -> None:
        rows[row][column] = rows[row][column].clone()
        rows[row][column].reshape(-1)[1] = value

    return damage


def drop(column: str, row: int = LATE) -> Any:
    """Return a damage: a row without a column."""
    return lambda rows: rows[row].pop(column)


FAULTS = {
    "input NaN": [("images", place("pixel_values", NAN), "`pixel_values`", "not finite")],
    "input infinite": [("images", place("pixel_values", INFINITE), "`pixel_values`", "not finite")],
    "token id out of range": [
        (problem, place("input_ids", value), "`input_ids`", "vocabulary")
        for problem in ("texts", "words")
        for value in (40, -1)
    ],
    "label NaN or infinite": [
        ("numbers", put("labels", value), "`labels`", "not finite") for value in (NAN, INFINITE, -INFINITE)
    ],
    "label out of range": [
        *(("images", put("labels", value, row), "`labels`", "classes") for value in (3, -1, 255) for row in (0, LATE)),
        *(("texts", put("labels", torch.tensor(value)), "`labels`", "classes") for value in (3, -2)),
        *(("tokens", place("labels", value), "`labels`", "classes") for value in (7, -1)),
        *(("words", place("labels", value), "`labels`", "classes") for value in (40, -7)),
    ],
    "None in a row": [
        *(
            ("images", put(name, None, row), f"`{name}`", "None")
            for name in ("pixel_values", "labels")
            for row in (0, LATE)
        ),
        *(("texts", put(name, None), f"`{name}`", "None") for name in ("input_ids", "attention_mask", "labels")),
        ("tokens", put("labels", [0, None, 1]), "`labels`", "None"),
    ],
    "column missing in a row": [
        *(("images", drop("pixel_values", row), "`pixel_values`", "no `") for row in (1, LATE)),
        *(("images", drop("labels", row), "`labels`", "no `") for row in (0, LATE)),
        *(("texts", drop(name), f"`{name}`", "no `") for name in ("input_ids", "attention_mask", "labels")),
    ],
    "ragged rows": [
        ("images", put("pixel_values", torch.zeros(3, 8, 16)), "`pixel_values`", "shape"),
        ("texts", put("input_ids", torch.ones(7, dtype=torch.long)), "`input_ids`", "shape"),
        ("tokens", put("labels", torch.zeros(3, dtype=torch.long)), "`labels`", "shape"),
    ],
    "word in place of a number": [("images", put("labels", "cat"), "labels", "collator")],
}
CASES = [
    pytest.param(kind, *case, id=f"{kind.replace(' ', '-')}-{number}")
    for kind, cases in FAULTS.items()
    for number, case in enumerate(cases)
]


@pytest.mark.parametrize(("kind", "problem", "damage", "column", "word"), CASES)
def test_a_broken_row_is_refused_by_column_and_row(kind, problem, damage, column, word, faults, tmp_path):
    with faults.refused(kind, column, word, error=InputError):
        train(tmp_path, problem, damage)


def all_at(rows: list[dict[str, Any]], change: Any) -> None:
    for row in rows:
        change(row)


@pytest.mark.parametrize("workers", [0, 1])
def test_in_a_worker_of_the_data_loader_it_is_the_same(workers, faults, tmp_path):
    with faults.refused("label out of range", "`labels`", "classes", error=InputError):
        train(tmp_path, "images", put("labels", 7), args={"dataloader_num_workers": workers})


EMPTY = {
    "nothing": lambda samples: {},
    "no rows": lambda samples: {"pixel_values": torch.zeros(0, 3, 16, 16), "labels": torch.zeros(0, dtype=torch.long)},
    "None": lambda samples: None,
    "a list": lambda samples: [],
}


class Late:
    """A collator that gives something else when it is called for the third step."""

    def __init__(self, other: Any):
        self.other, self.calls = other, 0

    def __call__(self, samples: Any) -> Any:
        self.calls += len(samples) == 4
        return self.other(samples) if self.calls == 3 else default_data_collator(samples)


@pytest.mark.parametrize("what", EMPTY)
def test_an_empty_batch_is_refused(what, faults, tmp_path):
    with faults.refused("empty batch", "samples", error=InputError):
        train(tmp_path, "images", lambda rows: None, collator=Late(EMPTY[what]))


OTHER = {
    "image size": ("images", {"pixel_values": torch.zeros(4, 3, 32, 32), "labels": torch.zeros(4, dtype=torch.long)}),
    "channels": ("images", {"pixel_values": torch.zeros(4, 1, 16, 16), "labels": torch.zeros(4, dtype=torch.long)}),
    "length": (
        "texts",
        {"input_ids": torch.ones(4, 40, dtype=torch.long), "labels": torch.zeros(4, dtype=torch.long)},
    ),
    "dtype": ("texts", {"input_ids": torch.ones(4, 10), "labels": torch.zeros(4, dtype=torch.long)}),
    "labels": ("images", {"pixel_values": torch.zeros(4, 3, 16, 16), "labels": torch.zeros(3, dtype=torch.long)}),
    "label shape": ("images", {"pixel_values": torch.zeros(4, 3, 16, 16), "labels": torch.zeros(4, 2)}),
}


@pytest.mark.parametrize("what", OTHER)
def test_a_later_batch_of_another_kind_is_refused(what, faults, tmp_path):
    """Its size is no model's, and the model's own error says little."""
    problem, batch = OTHER[what]
    with faults.refused("batch of another shape", error=InputError):
        train(tmp_path, problem, lambda rows: None, collator=Late(lambda samples: batch))


class BrokenRowError(Exception):
    """What a user's own data set raises."""


class Breaking:
    """A data set that raises in one of its rows."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if index == LATE:
            raise BrokenRowError(f"row {index} of shelf 7 is torn")
        return dict(self.rows[index])


class Streaming(IterableDataset):
    """The same as a stream."""

    def __init__(self, rows: Any):
        self.data = Breaking(rows)

    def __iter__(self) -> Any:
        return (self.data[index] for index in range(len(self.data)))


@pytest.mark.parametrize("kind", [Breaking, Streaming])
def test_an_error_of_the_data_set_comes_out_as_it_is(kind, faults, tmp_path):
    with faults.survived("row that raises", ENDED):
        trainer = distiller(tmp_path, {"max_steps": 12}, train_dataset=kind(images(24).rows))
        with pytest.raises(BrokenRowError, match="shelf 7") as caught:
            trainer.train()
        assert "training step" in "".join(getattr(caught.value, "__notes__", ["training step"]))


# ---- Models ---------------------------------------------------------------------------------------------------------


def broken_after(model: Any, module: Any, value: float, calls: int) -> None:
    """Let a module of a model give NaN or infinity from a call on."""
    seen: list[int] = []

    def hook(_: Any, inputs: Any, output: Any) -> Any:
        seen.append(1)
        if len(seen) <= calls:
            return output
        first = output[0] if isinstance(output, tuple) else output
        broken = first.clone()
        broken[0].reshape(-1)[0] = value
        return (broken, *output[1:]) if isinstance(output, tuple) else broken

    module.register_forward_hook(hook)


@pytest.mark.parametrize("value", [NAN, INFINITE])
@pytest.mark.parametrize("where", ["logits", "hidden states"])
def test_a_teacher_that_is_not_finite_is_named(where, value, faults, tmp_path):
    teacher = vit(3, 24, seed=9)
    module = teacher.classifier if where == "logits" else teacher.vit.layers[1]
    broken_after(teacher, module, value, 6)
    trainer = distiller(tmp_path, {"max_steps": 12}, teacher_model=teacher)
    with faults.refused(f"teacher's {where} not finite", "batch index 0", error=TeacherOutputError):
        trainer.train()


@pytest.mark.parametrize("value", [NAN, INFINITE])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_student_whose_weights_are_not_finite_is_told(when, value, faults, tmp_path):
    trainer = distiller(tmp_path, {"max_steps": 6})

    class Breaks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                with torch.no_grad():
                    trainer.student.classifier.weight[0, 0] = value

    if when == "before":
        with torch.no_grad():
            trainer.student.classifier.weight[0, 0] = value
    else:
        trainer.add_callback(Breaks())
    with faults.refused("student's weights not finite", "classifier.weight not finite", error=NonFiniteLossError):
        trainer.train()


def test_what_is_said_of_the_students_buffers_is_true(faults, tmp_path):
    """BatchNorm has taken in a batch whose loss is refused."""
    student = resnet()
    trainer = distiller(tmp_path, {"max_steps": 6}, model=student, teacher_model=resnet((8, 16), seed=9))
    seen: list[int] = []

    def hook(_: Any, inputs: Any) -> Any:
        seen.append(1)
        return (inputs[0] * NAN,) if len(seen) == 4 else None

    student.resnet.encoder.register_forward_pre_hook(hook)
    with faults.refused("student's buffers not finite", "running_mean", error=NonFiniteLossError) as _:
        trainer.train()


def test_finite_steps_before_it_are_kept(faults, tmp_path):
    """The control: without a fault the same trainings end."""
    for problem in PARTS:
        trainer = train(tmp_path / problem, problem, lambda rows: None, args={"max_steps": 3})
        assert trainer.state.global_step == 3 and np.isfinite(trainer.state.log_history[-1]["train_loss"])
