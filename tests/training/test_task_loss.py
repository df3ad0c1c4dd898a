"""training/task_loss.py: the share of a micro-batch is what one batch of the whole step would give, for every head.

Oracles are a training on one batch, and plain `Trainer` on it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import Samples, gpt2, losses, plain_arguments, weights
from matrix.tasks import ALL, LENGTH, TASKS, Task, model
from tiny import OrderedTrainer, arguments, cast
from torch.utils.data import SequentialSampler
from transformers import Trainer, default_data_collator

# transformers computes some losses in float32.
NEAR = {"rtol": 1e-5, "atol": 1e-6}
Rows = list[dict[str, Any]]


def unlabeled(name: str) -> Callable[[Rows], None]:
    """Return a function that takes a label away from one of the first two samples of four."""

    def change(rows: Rows) -> None:
        rows[0][name] = -100

    return change


def outside(rows: Rows) -> None:
    """One answer of four starts behind its text, and another two end there."""
    rows[0]["start_positions"] = rows[0]["end_positions"] = 99
    rows[3]["end_positions"] = LENGTH


def ignored(rows: Rows) -> None:
    """Two pictures of four have few labels."""
    for row in rows[:2]:
        row["labels"][:20] = 255


def shorter(rows: Rows) -> None:
    """Two texts of four have few words, so that few of them are learned."""
    for row in rows[:2]:
        row["labels"][3:] = -100


CHANGES: dict[str, Callable[[Rows], None]] = {
    "sequence-classification": unlabeled("labels"),
    "image-classification": unlabeled("labels"),
    "audio-classification": unlabeled("labels"),
    "multiple-choice": unlabeled("labels"),
    "time-series": unlabeled("target_values"),
    "question-answering": outside,
    "segmentation": ignored,
    "token-classification": shorter,
    "masked-lm": shorter,
    "speech-seq2seq": shorter,
}
WAV2VEC = dataclasses.replace(
    TASKS["ctc"], make=model("Wav2Vec2ForCTC", "wav2vec2", ctc_zero_infinity=True, ctc_loss_reduction="mean")
)
LEARNED = {name: task for name, task in TASKS.items() if task.terms == ALL}
CASES = {**LEARNED, "ctc-mean": WAV2VEC}
SUMMED = model("Wav2Vec2ForCTC", "wav2vec2", ctc_zero_infinity=True, ctc_loss_reduction="sum")
CASES["ctc"] = dataclasses.replace(TASKS["ctc"], make=SUMMED)


def four(name: str) -> Rows:
    """Return four samples of a task in float64, with uneven numbers of items."""
    rows = CASES[name].rows()[:4] if name in CASES else TASKS[name].rows()[:4]
    CHANGES.get(name, lambda _: None)(rows)
    return [cast(row, torch.float64) for row in rows]


def without_batch_norm(student: Any) -> Any:
    """Replace what is taken within a micro-batch by its nature."""
    for module in list(student.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.modules.batchnorm._BatchNorm):
                setattr(module, name, torch.nn.Identity())
    return student.double()


def trainer(task: Task, rows: Rows, folder: Path, size: int, **args: Any) -> OrderedTrainer:
    """Return a trainer that takes one step on four samples, in micro-batches of a size."""
    student = without_batch_norm(task.student_model())
    steps: dict[str, Any] = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": max(len(rows) // size, 1),
    }
    return OrderedTrainer(
        model=student,
        teacher_model=without_batch_norm(task.teacher_model()),
        args=arguments(folder, **{**task.args, **steps, "task_weight": 1.0, "feature_weight": 0.0, **args}),
        train_dataset=Samples(rows),
        data_collator=None if task.collator is None else task.collator(student),
    )


@pytest.mark.parametrize("name", CASES)
def test_two_micro_batches_are_one_batch(name: str, tmp_path: Path) -> None:
    found = []
    for size in (4, 2):
        made = trainer(CASES[name], four(name), tmp_path, size)
        made.train()
        found.append((weights(made.student), [losses(made, f"{term}_loss") for term in ("task", "logit")]))
    (whole, terms), (cut, others) = found
    assert all(entry[0] > 0 for entry in terms)
    torch.testing.assert_close(torch.tensor(others), torch.tensor(terms), **NEAR)
    torch.testing.assert_close(cut, whole, **NEAR)


class Plain(Trainer):
    """Takes the samples in their order."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("name", ["segmentation", "question-answering", "ctc", "ctc-mean", "time-series"])
def test_one_batch_is_trainers(name: str, tmp_path: Path) -> None:
    task, rows = CASES[name], four(name)
    made = trainer(task, rows, tmp_path, 2, logit_weight=1e-300)
    made.train()
    student = without_batch_norm(task.student_model())
    changes = {
        key: getattr(made.args, key) for key in ("optim", "learning_rate", "lr_scheduler_type", "max_grad_norm")
    }
    label_names = {key: value for key, value in task.args.items() if key == "label_names"}
    args = plain_arguments(tmp_path, **{**changes, **label_names, "max_steps": 1})
    plain = Plain(student, args, train_dataset=Samples(rows))
    plain.train()
    torch.testing.assert_close(weights(made.student), weights(student), **NEAR)
    assert losses(made, "task_loss") == pytest.approx(losses(plain), rel=1e-3)


def one_logit(rows: Rows) -> Rows:
    """Return pictures whose pixels are an object, or none."""
    return [{**row, "labels": (row["labels"] % 2).where(row["labels"] != 255, 255)} for row in rows]


def test_one_logit_a_pixel_is_judged_at_every_pixel(tmp_path: Path) -> None:
    task, rows, found = TASKS["segmentation"], one_logit(four("segmentation")), []
    single = dataclasses.replace(task, make=lambda **sizes: with_classes(task.make(**sizes), 1))
    for size in (4, 2):
        made = trainer(single, rows, tmp_path, size, logit_weight=1e-300)
        made.train()
        found.append(weights(made.student))
    torch.testing.assert_close(found[1], found[0], **NEAR)


def with_classes(segmenter: Any, count: int) -> Any:
    """Return a SegFormer with another number of classes."""
    torch.manual_seed(0)
    segmenter.config.num_labels = count
    return type(segmenter)(segmenter.config)


# ---- Micro-batches without any label -------------------------------------------------------------------------------


def nothing_counts(name: str) -> tuple[Task, Rows]:
    """Return a task with one sample of which nothing counts."""
    row = TASKS[name].rows()[0]
    if name == "segmentation":
        row["labels"].fill_(255)
    elif name == "question-answering":
        row["start_positions"] = row["end_positions"] = 99
    else:
        row["target_values"] = -100
    return TASKS[name], [cast(row, torch.float64)]


@pytest.mark.parametrize("name", ["segmentation", "question-answering", "time-series"])
def test_a_micro_batch_without_a_label_teaches_nothing(name: str, tmp_path: Path) -> None:
    task, rows = nothing_counts(name)
    made = trainer(task, four(name), tmp_path, 4, logit_weight=1e-300)
    made.train_dataset = Samples(rows)
    before = weights(made.student)
    made.train()
    assert losses(made, "task_loss") == [0.0]
    torch.testing.assert_close(weights(made.student), before, rtol=0, atol=1e-200)


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_text_of_one_token_teaches_nothing(chunk: int, smoothing: float, tmp_path: Path) -> None:
    ids = torch.arange(3, 9)
    rows = [{"input_ids": ids[:n], "labels": ids[:n]} for n in (6, 6, 1)]
    args: dict[str, Any] = {"per_device_train_batch_size": 1, "logit_chunk_size": chunk, "feature_weight": 0.0}
    made = OrderedTrainer(
        model=gpt2().double(),
        teacher_model=gpt2(3, 24, seed=9).double(),
        args=arguments(tmp_path, "task", label_smoothing_factor=smoothing, **args),
        train_dataset=Samples(rows),
        data_collator=default_data_collator,
    )
    made.train()
    first, _, third = losses(made, "task_loss")
    assert first > 0 and third == 0.0 and losses(made, "grad_norm")[2] == pytest.approx(0, abs=1e-200)


# ---- Losses that follow from no parts ------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "told"), [(2, 1), (4, 0)])
def test_a_detector_is_told_to_depend_on_the_cut(size: int, told: int, tmp_path: Path, caplog: Any) -> None:
    task = TASKS["object-detection"]
    steps: dict[str, Any] = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
    with caplog.at_level(logging.WARNING, logger="hf_semckd"):
        task.trainer(tmp_path, max_steps=2, **steps).train()
    assert sum("divided by the objects of each micro-batch" in entry for entry in caplog.messages) == told
