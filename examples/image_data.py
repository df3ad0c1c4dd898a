"""Load image classification data for the examples, and turn it into what a Vision Transformer takes."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, NamedSplit, load_dataset, load_from_disk
from PIL import Image as PillowImage
from safetensors.numpy import load_file

DIGITS_SPLITS = {"train": 900, "validation": 297, "test": 600}
DIGITS_SPLIT_SEED = 0
FASHION_NAMES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
FASHION_PREFIXES = {"train": "train", "test": "t10k"}
# Pixels up to this many (as float32: 256 MB) are prepared once; more are prepared while training.
MOST_PREPARED_VALUES = 64_000_000


def load_digits_images() -> DatasetDict:
    """Load scikit-learn's digits: 1797 scans of 8 x 8 pixels, 10 classes, in a fixed random split.

    Splits: 900 train, 297 validation (to choose settings on), 600 test.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(DIGITS_SPLIT_SEED).permutation(len(images))
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    splits, start = {}, 0
    for name, size in DIGITS_SPLITS.items():
        chosen = order[start : start + size]
        rows = {
            "image": [PillowImage.fromarray(images[i]) for i in chosen],
            "label": [int(digits.target[i]) for i in chosen],
        }
        splits[name] = Dataset.from_dict(rows, features=features)
        start += size
    return DatasetDict(splits)


def load_fashion_mnist(folder: str | Path) -> DatasetDict:
    """Load Fashion-MNIST (60000 train, 10000 test, 28 x 28 pixels) from its four `*-ubyte.gz` files."""
    files = [
        Path(folder) / f"{prefix}-{kind}-ubyte.gz"
        for prefix in FASHION_PREFIXES.values()
        for kind in ("images-idx3", "labels-idx1")
    ]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"Received fashion_mnist_dir={str(folder)!r}, which lacks {', '.join(missing)}; expected the files of "
            "Fashion-MNIST. On Debian and Ubuntu: apt install dataset-fashion-mnist. Elsewhere set fashion_mnist_dir."
        )
    features = Features({"image": Image(), "label": ClassLabel(names=FASHION_NAMES)})
    return DatasetDict(
        {
            name: Dataset.from_generator(
                _fashion_rows, features, gen_kwargs={"folder": str(folder), "prefix": prefix}, split=NamedSplit(name)
            )
            for name, prefix in FASHION_PREFIXES.items()
        }
    )


def _fashion_rows(folder: str, prefix: str) -> Iterator[dict[str, Any]]:
    images = read_idx(Path(folder) / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(Path(folder) / f"{prefix}-labels-idx1-ubyte.gz")
    for image, label in zip(images, labels, strict=True):
        yield {"image": PillowImage.fromarray(image), "label": int(label)}


def load_emoji(folder: str | Path) -> DatasetDict:
    """Load the emoji (64 x 64 pixels, 9 classes) that `scripts/fetch_image_parts.py` wrote.

    Splits: 70% train, 15% validation, 15% test; variants of one emoji lie in one split.
    """
    files = [Path(folder) / name for name in ("images.safetensors", "emoji.json")]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"Received {str(folder)!r}, which lacks {', '.join(missing)}; expected the folder emoji that "
            "`python scripts/fetch_image_parts.py` writes (by default data/image/emoji). Run that script first."
        )
    images = load_file(files[0])["images"]
    table = json.loads(files[1].read_text("utf-8"))
    features = Features({"image": Image(), "label": ClassLabel(names=table["classes"])})
    splits = {}
    for name in ("train", "validation", "test"):
        chosen = [index for index, row in enumerate(table["emoji"]) if row["split"] == name]
        rows = {
            "image": [PillowImage.fromarray(images[index]) for index in chosen],
            "label": [table["emoji"][index]["label"] for index in chosen],
        }
        splits[name] = Dataset.from_dict(rows, features=features, split=NamedSplit(name))
    return DatasetDict(splits)


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes: two zero bytes, the type 8, the number of axes, their sizes."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3] if content[:3] == b"\x00\x00\x08" and len(content) > 3 else 0
    start = 4 + 4 * axes
    shape = [int.from_bytes(content[place : place + 4], "big") for place in range(4, start, 4)]
    if not axes or len(content) != start + math.prod(shape):
        raise ValueError(f"Received {path.name}, which is no complete idx file of bytes; fetch it again.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def load_image_dataset(
    dataset_name: str | None = None,
    config_name: str | None = None,
    *,
    image_folder: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    test_share: float = 0.2,
    seed: int = 42,
) -> DatasetDict:
    """Load a Hub dataset (name, optional config), a saved dataset or a folder of images, as `image` and `label`.

    A folder of images holds one folder a class, or train / test folders of these. Without column names, the first
    column of images and the first column of classes are taken. There are always the splits `train` and `test`: where
    no labeled test split exists, the validation split becomes it; where neither does, `test_share` of the training
    rows is split off by `seed`.
    """
    if image_folder is not None:
        if not Path(image_folder).is_dir():
            raise FileNotFoundError(f"Received image_folder={image_folder!r}, which is no folder; check the path.")
        raw = load_dataset("imagefolder", data_dir=image_folder)
    elif (Path(str(dataset_name)) / "dataset_dict.json").is_file():
        raw = load_from_disk(str(dataset_name))
    else:
        raw = load_dataset(dataset_name, config_name)
    if "train" not in raw:
        raise ValueError(f"Received the splits {sorted(raw)}; expected one called 'train'. Choose another dataset.")
    splits = {name: raw[name] for name in ("train", "validation", "test") if name in raw}
    splits = {name: _two_columns(split, image_column, label_column) for name, split in splits.items()}
    splits = {name: split for name, split in splits.items() if len(split)}
    if "test" in splits:
        return DatasetDict(splits)
    if "validation" in splits:
        return DatasetDict(train=splits["train"], test=splits["validation"])
    return splits["train"].train_test_split(test_size=test_share, seed=seed)


def _two_columns(split: Dataset, image_column: str | None, label_column: str | None) -> Dataset:
    """Reduce a split to `image` and `label`, without the rows whose label is missing."""
    image_column = _column(split, image_column, "image_column", Image)
    label_column = _column(split, label_column, "label_column", ClassLabel)
    split = split.select_columns([image_column, label_column])
    split = split.rename_columns({image_column: "image", label_column: "label"})
    if not isinstance(split.features["label"], ClassLabel):
        return split.class_encode_column("label")
    return split.filter(lambda label: label is not None and label >= 0, input_columns=["label"])


def _column(split: Dataset, name: str | None, option: str, kind: type) -> str:
    found = [column for column, feature in split.features.items() if isinstance(feature, kind)]
    if name is None and found:
        return found[0]
    if name in split.column_names:
        return str(name)
    raise ValueError(
        f"Received the columns {split.column_names} and {option}={name!r}; expected a column of type {kind.__name__}. "
        f"Set {option} to one of the columns."
    )


def prepare_images(dataset: Dataset, processors: dict[str, Any], channels: int = 3) -> Dataset:
    """Turn images into tensors, once if they are few, else whenever they are read.

    Args:
        dataset: Columns `image` and `label`.
        processors: Name of an input (`pixel_values`, `teacher_pixel_values`) -> the image processor that makes it.
        channels: 1 for a model of gray images, otherwise 3.

    Returns:
        `labels`, and a column for each processor.
    """
    encode = partial(_encode, processors=processors, mode="L" if channels == 1 else "RGB")
    values = sum(array[0].size for name, array in encode(dataset[:1]).items() if name != "labels")
    if values * len(dataset) > MOST_PREPARED_VALUES:
        return dataset.with_transform(encode)
    prepared = dataset.map(
        encode, batched=True, remove_columns=dataset.column_names, keep_in_memory=True, desc="Preparing images"
    )
    return prepared.with_format("torch")


def _encode(batch: dict[str, list[Any]], processors: dict[str, Any], mode: str) -> dict[str, Any]:
    images = [image.convert(mode) for image in batch["image"]]
    encoded = {name: processor(images, return_tensors="np")["pixel_values"] for name, processor in processors.items()}
    return {"labels": batch["label"], **encoded}
