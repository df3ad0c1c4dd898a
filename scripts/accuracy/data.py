"""The data of the accuracy benchmark as tensors in memory: a pool to train on, a validation and a test split."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer

from hf_semckd.errors import ConfigurationError

from . import sources
from .sources import TEXT, Source

# Those of the pretrained image teacher's own training.
IMAGENET_MEAN, IMAGENET_DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# What splits a pool into training and validation rows, the same in all runs.
SPLIT_SEED = 0


class Rows(Dataset):
    """Labeled rows: a mapping of tensors whose first dimension is the sample.

    Args:
        columns: Inputs by name, and `labels`.
        classes: Number of classes.
    """

    def __init__(self, columns: Mapping[str, Tensor], classes: int):
        self.columns = dict(columns)
        self.classes = classes

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one row."""
        return {name: values[index] for name, values in self.columns.items()}

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """Return some of the rows."""
        chosen = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        return Rows({name: values[chosen] for name, values in self.columns.items()}, self.classes)


@dataclass(frozen=True)
class Splits:
    """What a protocol trains on and is measured on; no row is in two of them."""

    pool: Rows
    validation: Rows
    test: Rows


def collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack rows, and cut off what is padding in all of them."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    for prefix in ("", "teacher_"):
        mask = batch.get(f"{prefix}attention_mask")
        if mask is not None:
            longest = max(int(mask.sum(1).max()), 1)
            for name in (f"{prefix}input_ids", f"{prefix}attention_mask"):
                batch[name] = batch[name][:, :longest]
    return batch


def draw(pool: Rows, count: int, seed: int, noise: float = 0.0) -> Rows:
    """Draw training rows, as many of each class as possible, and mislabel a share of them.

    Args:
        pool: What to draw from.
        count: Number of rows; 0 for all.
        seed: Of the draw and of the noise.
        noise: Share of rows, in [0, 1), whose label becomes another class, each equally likely.

    Raises:
        ConfigurationError: When there are fewer rows, or no other class.
    """
    if count > len(pool) or (noise and pool.classes < 2):
        raise ConfigurationError(
            "These training rows cannot be drawn",
            received=f"{count} of {len(pool)} rows of {pool.classes} class(es), noise {noise}",
            expected="at most as many rows as there are, and two classes to mistake",
            todo="correct `train` or `noise` in the protocol",
        )
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(pool))
    if count:
        labels = pool.columns["labels"].numpy()[order]
        # The rank of each row within its class: the first `count / classes` of every class come first.
        rank = np.empty(len(order), dtype=np.int64)
        for label in range(pool.classes):
            members = np.flatnonzero(labels == label)
            rank[members] = np.arange(len(members))
        order = generator.permutation(order[np.argsort(rank, kind="stable")[:count]])
    rows = pool.take(order)
    wrong = generator.permutation(len(rows))[: round(noise * len(rows))]
    if len(wrong):
        shift = torch.as_tensor(generator.integers(1, pool.classes, size=len(wrong)))
        rows.columns["labels"][wrong] = (rows.columns["labels"][wrong] + shift) % pool.classes
    return rows


@functools.lru_cache(maxsize=2)
def load_splits(name: str, limits: tuple[tuple[str, Any], ...] = ()) -> Splits:
    """Load a data set by name, with splits of these sizes at most.

    Args:
        name: See `LOADERS`.
        limits: Pairs of `pool`, `validation`, `test` (numbers of rows), and what the loader takes.

    Raises:
        ConfigurationError: For an unknown name.
    """
    if name not in LOADERS:
        raise ConfigurationError(
            "Unknown data", received=name, expected=", ".join(LOADERS), todo="correct the protocol"
        )
    options = dict(limits)
    sizes = {split: options.pop(split, None) for split in ("pool", "validation", "test")}
    pool, validation, test = LOADERS[name](**options)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pool))
    if validation is None:
        held = sizes["validation"] or len(pool) // 5
        validation, order = pool.take(order[:held]), order[held:]
    return Splits(
        pool.take(order[: sizes["pool"]]),
        _first(validation, sizes["validation"]),
        _first(test, sizes["test"]),
    )


def _first(rows: Rows, count: int | None) -> Rows:
    order = np.random.default_rng(SPLIT_SEED).permutation(len(rows))
    return rows if count is None else rows.take(order[:count])


def _gray_images(source: Source, mean: float, deviation: float) -> tuple[Rows, None, Rows]:
    """Return images of one channel; their validation split is drawn from the pool."""

    def rows(split: str) -> Rows:
        pixels = source.inputs[split].astype(np.float32)[:, None] / 255
        values = torch.tensor((pixels - mean) / deviation, dtype=torch.float32)
        return Rows({"pixel_values": values, "labels": torch.tensor(source.labels[split])}, source.classes)

    return rows("train"), None, rows("test")


def _color_images(source: Source, size: int, teacher_size: int) -> tuple[Rows, Rows, Rows]:
    """Return images in the sizes of student and teacher, normalized as the pretrained teacher's were."""

    def rows(split: str) -> Rows:
        images = [Image.fromarray(pixels) for pixels in source.inputs[split]]
        columns: dict[str, Tensor] = {}
        for name, side in (("pixel_values", size), ("teacher_pixel_values", teacher_size)):
            pixels = np.stack([np.asarray(image.resize((side, side)), dtype=np.float32) for image in images]) / 255
            pixels = (pixels - IMAGENET_MEAN) / IMAGENET_DEVIATION
            columns[name] = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32).contiguous()
        return Rows({**columns, "labels": torch.tensor(source.labels[split])}, source.classes)

    return rows("train"), rows("validation"), rows("test")


def texts(source: Source, length: int) -> tuple[Rows, Rows, Rows]:
    """Return texts as the tokens of the pretrained teacher, padded to a length."""
    tokenizer = AutoTokenizer.from_pretrained(TEXT / "minilm-l6")

    def rows(split: str) -> Rows:
        encoded = tokenizer(
            source.inputs[split], truncation=True, max_length=length, padding="max_length", return_tensors="pt"
        )
        columns = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        return Rows({**columns, "labels": torch.tensor(source.labels[split])}, source.classes)

    return rows("train"), rows("validation"), rows("test")


LOADERS: dict[str, Callable[..., tuple[Rows, Rows | None, Rows]]] = {
    "digits": lambda: _gray_images(sources.digits(), 0.3, 0.38),
    "fashion_mnist": lambda: _gray_images(sources.fashion_mnist(), 0.286, 0.353),
    "emoji": lambda **sizes: _color_images(sources.emoji(), **sizes),
    "movie_snippets": lambda length: texts(sources.movie_snippets(), length),
    "newsgroups": lambda length: texts(sources.newsgroups(), length),
}
