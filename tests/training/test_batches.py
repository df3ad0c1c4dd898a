"""training/batches.py: what no batch may be follows from the models, in training and in evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from makers import Samples, Stream, bert, bert_tokens, config, distiller, gpt2, texts
from matrix.tasks import TASKS
from transformers import RobertaConfig, RobertaForSequenceClassification

from hf_semckd import SemCKDTrainer
from hf_semckd.errors import InputError
from hf_semckd.training.batches import batch_check


def roberta(types: int = 1) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return RobertaForSequenceClassification(
        RobertaConfig(vocab_size=40, max_position_embeddings=32, type_vocab_size=types, num_labels=3, **sizes)
    )


def spoiled(rows: list[dict[str, Any]], **changes: Any) -> Samples:
    """Return samples of which the last one is changed, which no first batch shows."""
    return Samples([*rows[:-1], {**rows[-1], **changes}])


def train(
    folder: Path, rows: Samples, student: Any, teacher: Any, evaluated: Samples | None = None, **parts: Any
) -> None:
    args = {"max_steps": 3, "eval_strategy": "no" if evaluated is None else "steps", "eval_steps": 1}
    parts = {"eval_dataset": evaluated, **parts}
    SemCKDTrainer(
        model=student, teacher_model=teacher, args=config(folder, **args), train_dataset=rows, **parts
    ).train()


@pytest.mark.parametrize("types", [(1, 1), (2, 1), (1, 2)])
def test_token_types_of_either_model_are_looked_at(types: tuple[int, int], tmp_path: Path) -> None:
    plain = [{**row, "token_type_ids": torch.zeros(10, dtype=torch.long)} for row in texts().rows]
    rows = spoiled(plain, token_type_ids=torch.ones(10, dtype=torch.long))
    with pytest.raises(InputError, match="(?s)token types outside a table of 1.*`token_type_ids`: 1"):
        train(tmp_path, rows, *map(roberta, types))
    train(tmp_path, rows, roberta(2), roberta(2))


@pytest.mark.parametrize(("value", "words"), [(-100, "replace -100 by 255"), (7, "num_labels")])
def test_pixels_are_ignored_by_the_students_own_number(value: int, words: str, tmp_path: Path) -> None:
    task = TASKS["segmentation"]
    rows = task.rows()
    rows[-1]["labels"] = rows[-1]["labels"].clone().index_fill_(0, torch.tensor([3]), value)
    with pytest.raises(InputError, match=f"(?s)`labels`: {value} in row.*{words}"):
        train(tmp_path, Samples(rows), task.student_model(), task.teacher_model())
    if value == -100:
        # What is advised works.
        student = task.student_model()
        student.config.semantic_loss_ignore_index = -100
        for row in rows:
            row["labels"] = row["labels"].where(row["labels"] != 255, -100)
        train(tmp_path, Samples(rows), student, task.teacher_model())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.bool, torch.float32])
@pytest.mark.parametrize("make", [bert, bert_tokens])
def test_labels_of_another_type_are_refused_before_training(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    labels = texts(labels="token" if make is bert_tokens else "sentence").rows
    rows = [{**row, "labels": row["labels"].clamp(min=0).to(dtype)} for row in labels]
    with pytest.raises(InputError, match="make labels int64"):
        train(tmp_path, Samples(rows), make(), make(layers=3, width=24, seed=9))


class Pixels(torch.nn.Module):
    """A student of one's own, which converts its labels and ignores 255; nothing tells of it."""

    def __init__(self, width: int):
        super().__init__()
        self.body, self.head = torch.nn.Conv2d(3, width, 3, padding=1), torch.nn.Conv2d(width, 4, 1)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(self.body(pixel_values).relu())
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": torch.nn.functional.cross_entropy(logits, labels.long(), ignore_index=255)}


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32])
def test_a_student_of_ones_own_has_labels_of_its_own(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "pixel_values": torch.randn(3, 8, 8, generator=generator),
            "labels": torch.randint(4, (8, 8), generator=generator).index_fill_(0, torch.tensor([row % 8]), 255),
        }
        for row in range(8)
    ]
    for row in rows:
        row["labels"] = row["labels"].to(dtype)
    parts = {"model": Pixels(6), "teacher_model": Pixels(8)}
    args = {"num_train_epochs": 1, "max_steps": -1, "feature_weight": 0.0}
    distiller(tmp_path, args, train_dataset=Samples(rows), **parts).train()
    bad = spoiled(rows, labels=torch.full((8, 8), 9, dtype=dtype))
    with pytest.raises(InputError, match="(?s)labels outside.*`labels`: 9"):
        distiller(tmp_path, args, train_dataset=bad, **parts).train()


def test_columns_for_the_metrics_alone_are_not_labels(tmp_path: Path) -> None:
    rows = [{**row, "is_hard": torch.tensor(True), "group": torch.tensor(99)} for row in texts().rows]
    student, teacher = bert(), bert(layers=3, width=24, seed=9)
    args = config(tmp_path, max_steps=2, label_names=["labels", "is_hard", "group"], remove_unused_columns=False)
    SemCKDTrainer(model=student, teacher_model=teacher, args=args, train_dataset=Samples(rows)).train()


@pytest.mark.parametrize("chunk", [0, 3])
def test_words_as_labels_are_of_one_type_however_losses_are_computed(chunk: int, tmp_path: Path) -> None:
    rows = [{**row, "labels": row["labels"].int()} for row in texts(labels="input", types=False).rows]
    with pytest.raises(InputError, match="make labels int64"):
        SemCKDTrainer(
            model=gpt2(),
            teacher_model=gpt2(3, 24, seed=9),
            args=config(tmp_path, logit_chunk_size=chunk),
            train_dataset=Samples(rows),
        )


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"class_labels": torch.tensor([9]), "boxes": torch.full((1, 4), 0.4)}, "class 9 in row"),
        ({"class_labels": torch.tensor([1])}, "no tensor `boxes` in row"),
        (None, "`labels`: None in row"),
    ],
)
def test_objects_are_looked_at_before_the_step(labels: Any, words: str, tmp_path: Path) -> None:
    task = TASKS["object-detection"]
    made = task.trainer(tmp_path)
    made.train_dataset = spoiled(task.rows(), labels=labels)
    with pytest.raises(InputError, match=words):
        made.train()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": torch.tensor(7)}, "`labels`: 7 in row 3"),
        ({"labels": None}, "`labels` is None"),
        ({"input_ids": torch.full((10,), 99)}, "`input_ids`: 99 in row 3"),
    ],
)
def test_evaluation_is_checked_as_training_is(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        train(tmp_path, texts(), bert(), bert(3, 24, 9), spoiled(texts(4).rows, **changes))


def test_evaluation_is_the_students_alone(tmp_path: Path) -> None:
    """The teacher has fewer token types, and the samples no labels: neither matters."""
    rows = [{**row, "token_type_ids": torch.ones(10, dtype=torch.long)} for row in texts(labels=None).rows]
    plain = [{**row, "token_type_ids": torch.zeros(10, dtype=torch.long)} for row in texts().rows]
    train(tmp_path, Samples(plain), roberta(2), roberta(1), Samples(rows))


def test_a_stream_that_gives_nothing_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the stream ended before its first one"):
        train(tmp_path, Stream(Samples([])), bert(), bert(3, 24, 9))


def test_of_several_label_columns_one_may_be_measured() -> None:
    batch = {"input_ids": torch.zeros(2, 4).long(), "labels": torch.tensor([0, 2]), "strength": torch.rand(2)}
    check = batch_check(batch, [bert()], ["labels", "strength"], 3)
    check(batch)
    with pytest.raises(InputError, match="make labels int64"):
        check({**batch, "labels": torch.tensor([0.0, 2.0])})
