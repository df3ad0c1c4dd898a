"""Labeled images and texts as they come: bytes and strings, by split."""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from hf_semckd.errors import ConfigurationError

from .rows import ROOT

FASHION = Path("/usr/share/datasets/fashion-mnist")
TEXT, IMAGES = ROOT / "data" / "text", ROOT / "data" / "image"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        inputs: By split, images as an array of bytes (N, H, W) or (N, H, W, 3), or texts.
        labels: By split, (N,) of classes, int64.
        classes: Number of classes.
    """

    inputs: dict[str, Any]
    labels: dict[str, np.ndarray]
    classes: int


def digits() -> Source:
    """Return scikit-learn's digits, 8 x 8 pixels: 900 train, 297 validation, 600 test, in a fixed random order."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    parts = dict(zip(SPLITS, np.split(order, [900, 1197]), strict=True))
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    return _source({name: images[part] for name, part in parts.items()}, data.target, parts)


def fashion_mnist(folder: Path = FASHION) -> Source:
    """Return Fashion-MNIST, 28 x 28 pixels: 60000 train, 10000 test."""
    kinds = {"images": "images-idx3", "labels": "labels-idx1"}
    prefixes = {"train": "train", "test": "t10k"}
    files = {
        (kind, split): folder / f"{prefix}-{name}-ubyte.gz"
        for kind, name in kinds.items()
        for split, prefix in prefixes.items()
    }
    _require(list(files.values()), "apt install dataset-fashion-mnist")
    images = {split: read_idx(files["images", split]) for split in prefixes}
    labels = {split: read_idx(files["labels", split]).astype(np.int64) for split in prefixes}
    return Source(images, labels, 10)


def emoji(folder: Path = IMAGES / "emoji") -> Source:
    """Return the emoji, 64 x 64 pixels in color; variants of one emoji lie in one split."""
    files = [folder / "images.safetensors", folder / "emoji.json"]
    _require(files, "python scripts/fetch_image_parts.py")
    images, table = load_file(files[0])["images"], json.loads(files[1].read_text("utf-8"))
    names = np.array([row["split"] for row in table["emoji"]])
    parts = {split: np.flatnonzero(names == split) for split in SPLITS}
    labels = np.array([row["label"] for row in table["emoji"]])
    return _source({split: images[part] for split, part in parts.items()}, labels, parts, len(table["classes"]))


def movie_snippets(folder: Path = TEXT / "movie_snippets") -> Source:
    """Return snippets of movie reviews, 0 negative and 1 positive."""
    return _texts(folder, 2)


def newsgroups(folder: Path = TEXT / "newsgroups") -> Source:
    """Return postings to 20 newsgroups."""
    _require([folder / "labels.json"], "python scripts/fetch_text_parts.py")
    return _texts(folder, len(json.loads((folder / "labels.json").read_text("utf-8"))))


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes: two zero bytes, the type 8, the number of axes, their sizes.

    Raises:
        ConfigurationError: When it is none, or incomplete.
    """
    content = gzip.decompress(path.read_bytes())
    axes = content[3] if content[:3] == b"\x00\x00\x08" and len(content) > 3 else 0
    start = 4 + 4 * axes
    shape = [int.from_bytes(content[place : place + 4], "big") for place in range(4, start, 4)]
    if not axes or len(content) != start + math.prod(shape):
        raise ConfigurationError(
            f"{path.name} cannot be read",
            received=f"{len(content)} bytes",
            expected="a complete idx file of bytes",
            todo="fetch it again",
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _texts(folder: Path, classes: int) -> Source:
    files = {split: folder / f"{split}.csv" for split in SPLITS}
    _require(list(files.values()), "python scripts/fetch_text_parts.py")
    rows = {}
    for split, path in files.items():
        with path.open(encoding="utf-8", newline="") as stream:
            rows[split] = list(csv.DictReader(stream))
    return Source(
        {split: [row["text"] for row in entries] for split, entries in rows.items()},
        {split: np.array([int(row["label"]) for row in entries]) for split, entries in rows.items()},
        classes,
    )


def _source(images: dict[str, Any], labels: np.ndarray, parts: dict[str, np.ndarray], classes: int = 10) -> Source:
    return Source(images, {split: labels[part].astype(np.int64) for split, part in parts.items()}, classes)


def _require(files: Sequence[Path], command: str) -> None:
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise ConfigurationError(
            "The data is not there", received=f"no {', '.join(missing)}", expected="these files", todo=command
        )
