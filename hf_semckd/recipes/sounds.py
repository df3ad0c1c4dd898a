"""A folder of sounds by class, read without the decoder that `datasets` asks for."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from datasets import Audio, ClassLabel, Dataset, DatasetDict, DatasetInfo, Features

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
SPLITS = ("train", "validation", "valid", "val", "dev", "test")


def is_sound_folder(folder: Path) -> bool:
    """Whether there are sounds below a folder, and no tables that describe them."""
    tables = next(folder.rglob("metadata.*"), None)
    return tables is None and any(path.suffix.lower() in SUFFIXES for path in folder.rglob("*.*"))


def load_sound_folder(folder: Path) -> DatasetDict:
    """Return the sounds of `folder/class/*.wav`, or of `folder/split/class/*.wav`, with their class as the label."""
    splits = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and path.name in SPLITS}
    splits = splits or {"train": folder}
    names = sorted({path.name for split in splits.values() for path in split.iterdir() if path.is_dir()})
    features = Features({"audio": Audio(decode=False), "label": ClassLabel(names=names)})
    return DatasetDict({name: _rows(split, names, features) for name, split in splits.items()})


def _rows(folder: Path, names: list[str], features: Features) -> Dataset:
    found = [
        (str(path.absolute()), label)
        for label, name in enumerate(names)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    cells = pa.array([{"bytes": None, "path": path} for path, _ in found], type=features["audio"].pa_type)
    table = pa.table({"audio": cells, "label": pa.array([label for _, label in found], type=pa.int64())})
    return Dataset(table, info=DatasetInfo(features=features))
