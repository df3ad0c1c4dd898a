"""The pairs of teacher and student: the architectures of real ones, with random weights and random data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

BASIC_STAGES = [64, 128, 256, 512]
SMALL_STAGES = [64, 128, 256]
TINY_VOCABULARY = 100
# Teacher, student and data each have their own.
TEACHER_SEED, STUDENT_SEED, DATA_SEED = 0, 1, 2


@dataclass(frozen=True)
class Pair:
    """A teacher, a student and the shape of their data.

    Attributes:
        name: What the pair is called on the command line.
        family: `bert`, `vit` or `resnet`.
        teacher: Fields of the teacher's configuration, where they are not the family's defaults.
        student: The same for the student.
        batch_size: Samples in a micro-batch.
        size: Tokens of a text, or pixels along the side of an image.
        labels: Number of classes.
        small_images: Whether the stem keeps the resolution, as networks for 32-pixel images do.
    """

    name: str
    family: str
    teacher: Mapping[str, Any]
    student: Mapping[str, Any]
    batch_size: int
    size: int
    labels: int
    small_images: bool = False

    def make_teacher(self) -> PreTrainedModel:
        """Return a teacher, always with the same random weights."""
        return self._make(self.teacher, TEACHER_SEED)

    def make_student(self) -> PreTrainedModel:
        """Return a student, always with the same random weights."""
        return self._make(self.student, STUDENT_SEED)

    def make_batches(self, count: int) -> list[dict[str, Tensor]]:
        """Return different random batches, on the CPU; every token is a real one."""
        generator = torch.Generator().manual_seed(DATA_SEED)
        return [self._make_batch(generator) for _ in range(count)]

    def _make(self, fields: Mapping[str, Any], seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        return MAKERS[self.family](self, {**fields, "num_labels": self.labels})

    def _make_batch(self, generator: torch.Generator) -> dict[str, Tensor]:
        labels = torch.randint(self.labels, (self.batch_size,), generator=generator)
        if self.family != "bert":
            pixels = torch.randn(self.batch_size, 3, self.size, self.size, generator=generator)
            return {"pixel_values": pixels, "labels": labels}
        vocabulary = self.teacher.get("vocab_size", BertConfig().vocab_size)
        tokens = torch.randint(vocabulary, (self.batch_size, self.size), generator=generator)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def _make_bert(pair: Pair, fields: dict[str, Any]) -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**fields))


def _make_vit(pair: Pair, fields: dict[str, Any]) -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig(image_size=pair.size, **fields))


def _make_resnet(pair: Pair, fields: dict[str, Any]) -> PreTrainedModel:
    model = ResNetForImageClassification(ResNetConfig(layer_type="basic", **fields))
    if pair.small_images:
        # The configuration knows only the stem for large images, which would leave 8 x 8 of 32 x 32 pixels.
        stem = model.resnet.embedder
        width = stem.embedder.convolution.out_channels
        stem.embedder.convolution = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
        stem.pooler = nn.Identity()
    return model


MAKERS: dict[str, Callable[[Pair, dict[str, Any]], PreTrainedModel]] = {
    "bert": _make_bert,
    "vit": _make_vit,
    "resnet": _make_resnet,
}


def _bert(layers: int, width: int, heads: int, intermediate: int, **others: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return {**sizes, "intermediate_size": intermediate, **others}


def _resnet(depths: list[int], widths: list[int], stem: int) -> dict[str, Any]:
    return {"depths": depths, "hidden_sizes": widths, "embedding_size": stem, "downsample_in_first_stage": False}


FULL = (
    Pair("bert-6x384", "bert", {}, _bert(6, 384, 6, 1536), batch_size=16, size=128, labels=2),
    Pair("bert-4x312", "bert", {}, _bert(4, 312, 12, 1200), batch_size=16, size=128, labels=2),
    Pair("vit-12x192", "vit", {}, _bert(12, 192, 3, 768), batch_size=8, size=224, labels=1000),
    Pair(
        "resnet34-18",
        "resnet",
        _resnet([3, 4, 6, 3], BASIC_STAGES, 64),
        _resnet([2, 2, 2, 2], BASIC_STAGES, 64),
        batch_size=16,
        size=224,
        labels=1000,
    ),
    Pair(
        "resnet32x4-8x4",
        "resnet",
        _resnet([5, 5, 5], SMALL_STAGES, 32),
        _resnet([1, 1, 1], SMALL_STAGES, 32),
        batch_size=64,
        size=32,
        labels=100,
        small_images=True,
    ),
)
NAMES = tuple(pair.name for pair in FULL)
_TINY_TEXT = {"vocab_size": TINY_VOCABULARY, "max_position_embeddings": 16}
_TINY_MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "bert": (_bert(3, 32, 2, 64, **_TINY_TEXT), _bert(2, 16, 2, 32, **_TINY_TEXT), 8),
    "vit": (_bert(3, 32, 2, 64, patch_size=8), _bert(2, 16, 2, 32, patch_size=8), 32),
    "resnet": (_resnet([2, 2], [8, 16], 8), _resnet([1, 1], [8, 16], 8), 32),
}


def find_pair(name: str, tiny: bool = False, batch_size: int | None = None) -> Pair:
    """Return a pair by its name.

    Args:
        name: One of `NAMES`.
        tiny: Whether models of a few thousand parameters take its place, to try the measurement out.
        batch_size: Samples in a micro-batch; None: as many as the pair has by itself. Others change its name.
    """
    pair = next(entry for entry in FULL if entry.name == name)
    if tiny:
        teacher, student, size = _TINY_MODELS[pair.family]
        pair = replace(
            pair, name=f"{name} (tiny)", teacher=teacher, student=student, size=size, batch_size=4, labels=5
        )
    if batch_size in (None, pair.batch_size):
        return pair
    return replace(pair, name=f"{pair.name}, batch {batch_size}", batch_size=batch_size)


def place_of(name: str) -> tuple[int, int]:
    """Return where a pair of that name, as `find_pair` gives it, stands in a table: after the smaller batches."""
    model, _, batch = name.partition(", batch ")
    return NAMES.index(model.removesuffix(" (tiny)")), int(batch or 0)
