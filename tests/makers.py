"""Tiny models, datasets and arguments for the trainer's tests; everything is made from a configuration and a seed."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_semckd import SemCKDConfig, SemCKDTrainer

LABELS = 3
IMAGE = 16
VOCABULARY = 40
PADDING = 0
QUIET: dict[str, Any] = {
    "use_cpu": os.environ.get("HF_SEMCKD_TEST_DEVICE", "cpu") == "cpu",
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "dataloader_pin_memory": False,
}
# Every training collects garbage; what the imports made need not be looked through each time, which takes 0.3 s.
gc.freeze()


def config(folder: Any, **changes: Any) -> SemCKDConfig:
    """Return quick, quiet arguments for a distillation."""
    return SemCKDConfig(output_dir=str(folder), **{**QUIET, **changes})


def plain_arguments(folder: Any, **changes: Any) -> TrainingArguments:
    """Return the same arguments for a plain `Trainer`."""
    return TrainingArguments(output_dir=str(folder), **{**QUIET, **changes})


def vit(layers: int = 2, width: int = 16, seed: int = 0, labels: int = LABELS, **changes: Any) -> Any:
    """Return a ViT for `IMAGE` x `IMAGE` pictures, by default without dropout."""
    torch.manual_seed(seed)
    settings = {"image_size": IMAGE, "patch_size": 4, "num_attention_heads": 2, "intermediate_size": 2 * width}
    return ViTForImageClassification(
        ViTConfig(hidden_size=width, num_hidden_layers=layers, num_labels=labels, **{**settings, **changes})
    )


def resnet(widths: tuple[int, ...] = (8, 12), seed: int = 0, labels: int = LABELS) -> Any:
    """Return a ResNet with one basic block a stage."""
    torch.manual_seed(seed)
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=6,
            hidden_sizes=list(widths),
            depths=[1] * len(widths),
            layer_type="basic",
            num_labels=labels,
        )
    )


def _bert_config(layers: int, width: int, labels: int, **changes: Any) -> BertConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": PADDING,
    }
    return BertConfig(hidden_size=width, num_hidden_layers=layers, num_labels=labels, **{**settings, **changes})


def bert(
    layers: int = 2, width: int = 16, seed: int = 0, labels: int = LABELS, head: Any = None, **changes: Any
) -> Any:
    """Return a BERT, by default one that classifies sentences and has no dropout."""
    torch.manual_seed(seed)
    return (head or BertForSequenceClassification)(_bert_config(layers, width, labels, **changes))


def bert_mlm(**changes: Any) -> Any:
    """Return a BERT that fills in masks."""
    return bert(head=BertForMaskedLM, **changes)


def bert_tokens(**changes: Any) -> Any:
    """Return a BERT that classifies tokens."""
    return bert(head=BertForTokenClassification, **changes)


def distilbert(layers: int = 2, width: int = 12, seed: int = 0, labels: int = LABELS) -> Any:
    """Return a DistilBERT, whose forward takes no token_type_ids."""
    torch.manual_seed(seed)
    return DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=32,
            dim=width,
            hidden_dim=2 * width,
            n_layers=layers,
            n_heads=2,
            num_labels=labels,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        )
    )


def gpt2(layers: int = 2, width: int = 16, seed: int = 0) -> Any:
    """Return a GPT-2 that predicts the next token."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=32,
            n_embd=width,
            n_layer=layers,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


class Samples(Dataset):
    """A map-style dataset of dictionaries, without column names."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index])


class Stream(IterableDataset):
    """Samples without a length, which the workers of a loader share out."""

    def __init__(self, rows: Samples):
        self.rows = rows.rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        return iter(self.rows if worker is None else self.rows[worker.id :: worker.num_workers])


def images(count: int = 12, seed: int = 1, size: int = IMAGE, labels: int | None = LABELS) -> Samples:
    """Return random pictures, with labels unless `labels` is None."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        row: dict[str, Any] = {"pixel_values": torch.randn(3, size, size, generator=generator)}
        if labels is not None:
            row["labels"] = int(torch.randint(labels, (1,), generator=generator))
        rows.append(row)
    return Samples(rows)


def texts(
    count: int = 12, seed: int = 1, length: int = 10, labels: str | None = "sentence", types: bool = True
) -> Samples:
    """Return random sentences of 3 to `length` tokens, padded to `length`.

    Args:
        count: Number of sentences.
        seed: Of the generator.
        length: Of the padded sentences.
        labels: `sentence` (one class), `token` (one class a token, -100 on padding), `input` (the tokens themselves,
            -100 on padding), or None.
        types: Whether there are token_type_ids.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        tokens = int(torch.randint(3, length + 1, (1,), generator=generator)) if index else length
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask = (torch.arange(length) < tokens).long()
        row = {"input_ids": ids * mask, "attention_mask": mask}
        if types:
            row["token_type_ids"] = (torch.arange(length) >= length // 2).long() * mask
        classes = torch.randint(LABELS, (length,), generator=generator)
        targets = {
            "sentence": classes[0],
            "token": classes.where(mask == 1, -100),
            "input": ids.where(mask == 1, -100),
        }
        if labels is not None:
            row["labels"] = targets[labels].clone()
        rows.append(row)
    return Samples(rows)


def distiller(folder: Any, args: dict[str, Any] | None = None, **parts: Any) -> SemCKDTrainer:
    """Return a trainer of a ViT with a deeper and wider ViT as its teacher.

    Args:
        folder: Where it may write.
        args: Changes of the arguments.
        parts: Changes of what the trainer is given.
    """
    defaults = {"model": vit(), "teacher_model": vit(3, 24, seed=9), "train_dataset": images()}
    return SemCKDTrainer(args=config(folder, **(args or {})), **{**defaults, **parts})


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of everything in a model's state."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Check two states for equality, bit for bit."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def losses(trainer: Any, name: str = "loss") -> list[float]:
    """Return one number of every log entry that has it."""
    return [row[name] for row in trainer.state.log_history if name in row]


def traces(model: nn.Module) -> list[tuple[Any, ...]]:
    """Return all by which a change of a module can be seen, for the module and everything below it."""
    return [
        (name, type(module), sorted(module.__dict__), list(module._modules), _hooks(module))
        for name, module in model.named_modules()
    ]


def _hooks(module: nn.Module) -> dict[str, list[Any]]:
    return {name: list(value) for name, value in module.__dict__.items() if "hook" in name and isinstance(value, dict)}
