"""scripts/accuracy/sources.py: splits, files as they are written, and what to run where they are missing."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accuracy import sources

from hf_semckd.errors import ConfigurationError


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_digits_are_split_once_and_for_all():
    source, again = sources.digits(), sources.digits()
    assert {name: len(split) for name, split in source.inputs.items()} == {
        "train": 900,
        "validation": 297,
        "test": 600,
    }
    assert source.classes == 10 and source.labels["test"].tolist() == again.labels["test"].tolist()
    seen = {name: {image.tobytes() for image in split} for name, split in source.inputs.items()}
    assert not seen["train"] & seen["test"]


def test_fashion_mnist_is_read_from_its_idx_files(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (12, 28, 28), np.uint8), np.arange(12, dtype=np.uint8) % 10
    for prefix, count in (("train", 12), ("t10k", 5)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images[:count])
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels[:count])
    source = sources.fashion_mnist(tmp_path)
    assert np.array_equal(source.inputs["train"], images) and np.array_equal(source.inputs["test"], images[:5])
    assert source.labels["train"].tolist() == labels.tolist() and source.labels["train"].dtype == np.int64


@pytest.mark.parametrize("content", [b"", b"\x00\x00\x08\x01\x00\x00\x00\x05abc"])
def test_a_damaged_idx_file_is_refused(tmp_path, content):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ConfigurationError, match=r"(?s)x\.gz.*fetch it again"):
        sources.read_idx(path)


def test_texts_are_read_as_they_were_written(tmp_path):
    rows: dict[str, list[tuple[Any, ...]]] = {
        "train": [('a "film"', 1), ("NA", 0)],
        "validation": [("one, two", 1)],
        "test": [("two\nlines", 0)],
    }
    for split, entries in rows.items():
        with (tmp_path / f"{split}.csv").open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows([("text", "label"), *entries])
    (tmp_path / "labels.json").write_text(json.dumps(["a", "b", "c"]))
    for source, classes in ((sources.movie_snippets(tmp_path), 2), (sources.newsgroups(tmp_path), 3)):
        assert source.inputs == {split: [text for text, _ in entries] for split, entries in rows.items()}
        assert source.labels["train"].tolist() == [1, 0] and source.classes == classes


@pytest.mark.parametrize(
    ("load", "pieces"),
    [
        (sources.newsgroups, ["labels.json", "python scripts/fetch_text_parts.py"]),
        (sources.movie_snippets, ["train.csv", "test.csv", "python scripts/fetch_text_parts.py"]),
        (sources.emoji, ["images.safetensors", "emoji.json", "python scripts/fetch_image_parts.py"]),
        (sources.fashion_mnist, ["t10k-labels-idx1-ubyte.gz", "apt install dataset-fashion-mnist"]),
    ],
)
def test_a_loader_names_what_to_run(tmp_path, load, pieces):
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path)
    for piece in pieces:
        assert piece in str(caught.value)
