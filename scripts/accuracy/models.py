"""The models of the accuracy benchmark, and teachers that are trained once and kept."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    Dinov2ForImageClassification,
    PreTrainedModel,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from .data import Rows, collate
from .rows import OUTPUTS
from .sources import IMAGES, TEXT

TEACHER_SEED = 0
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "log_level": "error"}
COMMON = {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "remove_unused_columns": False}


def make_resnet(
    classes: int, channels: int, *, width: int, depth: int, stages: int = 3, pooled: bool = True
) -> PreTrainedModel:
    """Return a ResNet of basic blocks, whose stages have width, 2 * width, ... channels.

    Args:
        classes: Number of classes.
        channels: Of the images.
        width: Channels of the stem and of the first stage.
        depth: Blocks in a stage.
        stages: Number of stages.
        pooled: Whether the stem's convolution, of stride 2, is followed by its pooling; without, for small images.
    """
    sizes = _stages(width, depth, stages)
    config = ResNetConfig(num_channels=channels, layer_type="basic", num_labels=classes, **sizes)
    model = ResNetForImageClassification(config)
    if not pooled:
        model.resnet.embedder.pooler = nn.Identity()
    return model


def make_regnet(classes: int, channels: int, *, width: int, depth: int, stages: int = 3) -> PreTrainedModel:
    """Return a RegNet-Y, of bottlenecks with grouped convolutions, of width, 2 * width, ... channels in its stages."""
    sizes = {**_stages(width, depth, stages), "groups_width": width // 2}
    return RegNetForImageClassification(
        RegNetConfig(num_channels=channels, layer_type="y", num_labels=classes, **sizes)
    )


def make_vit(
    classes: int, channels: int, *, size: int, patch: int, depth: int, width: int, expansion: int = 2
) -> PreTrainedModel:
    """Return a ViT with heads of about 24 channels."""
    config = ViTConfig(
        num_channels=channels,
        image_size=size,
        patch_size=patch,
        num_labels=classes,
        **_blocks(width, depth, 24, expansion),
    )
    return ViTForImageClassification(config)


def make_bert(classes: int, channels: int, *, depth: int, width: int, length: int) -> PreTrainedModel:
    """Return a BERT with the vocabulary of the pretrained teacher and heads of 32 channels."""
    tokenizer = AutoTokenizer.from_pretrained(TEXT / "minilm-l6")
    config = BertConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=length,
        num_labels=classes,
        **_blocks(width, depth, 32, expansion=4),
    )
    return BertForSequenceClassification(config)


def load_minilm(classes: int, channels: int, *, depth: int | None = None) -> PreTrainedModel:
    """Return the pretrained MiniLM, or its first layers, with a new classifier."""
    layers = {} if depth is None else {"num_hidden_layers": depth}
    return AutoModelForSequenceClassification.from_pretrained(TEXT / "minilm-l6", num_labels=classes, **layers)


def load_dinov2(classes: int, channels: int) -> PreTrainedModel:
    """Return the pretrained DINOv2-small with a new classifier."""
    return Dinov2ForImageClassification.from_pretrained(IMAGES / "dinov2-small", num_labels=classes)


def _stages(width: int, depth: int, stages: int) -> dict[str, Any]:
    widths = [width * 2**stage for stage in range(stages)]
    return {"embedding_size": width, "hidden_sizes": widths, "depths": [depth] * stages}


def _blocks(width: int, depth: int, head: int, expansion: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": depth,
        "hidden_size": width,
        "intermediate_size": expansion * width,
        "num_attention_heads": max(1, width // head),
        # 0.02 is for a width of 768; with it a narrow model hardly starts to learn.
        "initializer_range": 0.02 * (768 / width) ** 0.5,
    }


FAMILIES = {
    "resnet": make_resnet,
    "regnet": make_regnet,
    "vit": make_vit,
    "bert": make_bert,
    "minilm": load_minilm,
    "dinov2": load_dinov2,
}
# Whose layers are maps.
MAP_FAMILIES = {"resnet", "regnet"}


def make_model(model: Mapping[str, Any], rows: Rows, seed: int) -> PreTrainedModel:
    """Return a new model of a family for some data, the same for equal seeds.

    Args:
        model: `family`, and what its maker takes.
        rows: Data that it is for.
        seed: Of its weights.
    """
    options = {name: value for name, value in model.items() if name not in ("family", "name")}
    images = rows.columns.get("pixel_values")
    set_seed(seed)
    return FAMILIES[model["family"]](rows.classes, 0 if images is None else images.shape[1], **options)


def teacher_rows(rows: Rows) -> Rows:
    """Return rows as the teacher sees them: its own columns under their plain names."""
    own = {name.removeprefix("teacher_"): v for name, v in rows.columns.items() if name.startswith("teacher_")}
    return Rows({**rows.columns, **own}, rows.classes) if own else rows


def trained_teacher(
    data: Mapping[str, Any],
    model: Mapping[str, Any],
    training: Mapping[str, Any],
    rows: Rows,
    device: str = "cpu",
    outputs: Path = OUTPUTS,
) -> Any:
    """Return a teacher on the CPU, trained now with a fixed seed or loaded if it was trained before.

    Args:
        data: What the protocol says of the data.
        model: What it says of the teacher.
        training: Training arguments.
        rows: What it is trained on.
        device: `cpu` or `cuda`, where it is trained if it has to be.
        outputs: Folder whose subfolder `teachers` keeps it.
    """
    described = {"data": data, "model": model, "training": training, "rows": len(rows)}
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    teacher = make_model(model, teacher_rows(rows), TEACHER_SEED)
    teachers = outputs / "teachers"
    folder = teachers / f"{model['name']}-{key}"
    if folder.is_dir():
        return type(teacher).from_pretrained(folder).eval()
    print(f"training teacher {model['name']} on {len(rows)} rows", file=sys.stderr, flush=True)
    teachers.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=teachers) as work:
        args = TrainingArguments(work, seed=TEACHER_SEED, use_cpu=device == "cpu", **{**QUIET, **COMMON, **training})
        Trainer(teacher, args, train_dataset=_own_columns(teacher_rows(rows)), data_collator=collate).train()
        kept = Path(work) / "kept"
        teacher.save_pretrained(kept)
        (kept / "described.json").write_text(json.dumps(described, indent=2))
        if not folder.is_dir():
            shutil.move(kept, folder)
    return teacher.cpu().eval()


def _own_columns(rows: Rows) -> Rows:
    return Rows({n: v for n, v in rows.columns.items() if not n.startswith("teacher_")}, rows.classes)


@torch.no_grad()
def accuracy(model: nn.Module, rows: Rows, batch_size: int = 500) -> float:
    """Return the share of rows that a model classifies rightly, where the model is."""
    model.eval()
    device = next(model.parameters(), torch.empty(0)).device
    right = 0
    for start in range(0, len(rows), batch_size):
        batch = collate([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch.pop("labels")
        inputs = {name: value for name, value in batch.items() if not name.startswith("teacher_")}
        right += int((model(**inputs).logits.argmax(-1) == labels).sum())
    return right / len(rows)
