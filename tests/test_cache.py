"""Cached teacher outputs: the live run's losses, keys that follow content, and damage that costs nothing."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_semckd import SemCKDConfig, SemCKDTrainer
from hf_semckd.cache import right_padded_lengths, sample_keys, teacher_fingerprint


def vit(width: int, layers: int) -> ViTForImageClassification:
    torch.manual_seed(width)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )
    return ViTForImageClassification(config).double()


def bert(width: int, layers: int) -> BertForSequenceClassification:
    torch.manual_seed(width)
    config = BertConfig(
        vocab_size=30,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config).double()


def images(count: int = 10) -> Dataset:
    generator = np.random.default_rng(0)
    pixels = generator.normal(size=(count, 1, 8, 8))
    dataset = Dataset.from_dict({"pixel_values": pixels, "labels": generator.integers(0, 3, count)})
    return dataset.with_format("torch", dtype=torch.float64, columns=["pixel_values"], output_all_columns=True)


def sentences(count: int = 10) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        ids = torch.randint(1, 30, (3 + index % 5,), generator=generator)
        rows.append({"input_ids": ids, "labels": torch.tensor(index % 3)})
    return rows


def pad(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    mask = (ids > 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.stack([row["labels"] for row in rows])}


def run(tmp_path: Path, kind: str, cache: Path | None, teacher: PreTrainedModel | None = None) -> SemCKDTrainer:
    make, data, collator = (vit, images(), None) if kind == "image" else (bert, sentences(), pad)
    args = SemCKDConfig(
        str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=0.1,
        optim="sgd",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        teacher_cache_dir=None if cache is None else str(cache),
    )
    teacher = teacher or make(16, 3)
    trainer = SemCKDTrainer(make(8, 2), args, collator, data, teacher_model=teacher)
    trainer.train()
    return trainer


def losses(trainer: SemCKDTrainer) -> list[list[float]]:
    names = ("loss", "task_loss", "logit_loss", "feature_loss")
    return [[row[name] for name in names] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("kind", ["image", "text"])
def test_cached_outputs_give_the_live_losses(tmp_path: Path, kind: str) -> None:
    live = run(tmp_path, kind, None)
    filling = run(tmp_path, kind, tmp_path / "cache")
    cached = run(tmp_path, kind, tmp_path / "cache")
    np.testing.assert_allclose(losses(filling), losses(live), rtol=1e-9)
    np.testing.assert_allclose(losses(cached), losses(live), rtol=1e-9)
    for name, value in live.student.state_dict().items():
        torch.testing.assert_close(cached.student.state_dict()[name], value, rtol=1e-8, atol=1e-10)


def test_a_full_cache_never_runs_the_teacher(tmp_path: Path) -> None:
    run(tmp_path, "image", tmp_path / "cache")
    teacher = vit(16, 3)
    calls = []
    handle = teacher.register_forward_hook(lambda *_: calls.append(1))
    run(tmp_path, "image", tmp_path / "cache", teacher)
    handle.remove()
    assert len(calls) == 1, "one probing pass finds the layers; training itself must not call the teacher"


def test_another_teacher_is_another_cache(tmp_path: Path) -> None:
    teacher = vit(16, 3)
    before = teacher_fingerprint(teacher, [1, 2], True)
    assert teacher_fingerprint(vit(16, 3), [1, 2], True) == before
    assert teacher_fingerprint(teacher, [1], True) != before
    assert teacher_fingerprint(teacher, [1, 2], False) != before
    with torch.no_grad():
        teacher.classifier.bias[0] += 1e-12
    assert teacher_fingerprint(teacher, [1, 2], True) != before


def test_keys_follow_the_content_and_not_the_padding() -> None:
    rows = sentences(4)
    wide = pad([*rows, {"input_ids": torch.arange(1, 15), "labels": torch.tensor(0)}])
    narrow = pad(rows)
    del wide["labels"], narrow["labels"]
    narrow_keys = sample_keys(narrow, right_padded_lengths(narrow))
    assert sample_keys(wide, right_padded_lengths(wide))[:4] == narrow_keys
    assert len(set(narrow_keys)) == 4
    narrow["input_ids"][0, 0] += 1
    changed = sample_keys(narrow, right_padded_lengths(narrow))
    assert changed[0] != narrow_keys[0]
    assert changed[1:] == narrow_keys[1:]


def test_left_padding_is_part_of_the_key() -> None:
    ids = torch.tensor([[0, 5, 6]])
    left = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    assert right_padded_lengths(left) is None
    right = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    assert sample_keys(left, None) != sample_keys(right, right_padded_lengths(right))


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with caplog.at_level(logging.WARNING, logger="hf_semckd.store"):
        trainer = run(tmp_path, "image", tmp_path / "cache")
    assert trainer.state.global_step == 6
    assert sum("not stored any more" in record.message for record in caplog.records) == 1
