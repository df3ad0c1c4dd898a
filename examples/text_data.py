"""Load text classification data for the examples as a `DatasetDict` with the columns `text` and `label`."""

from __future__ import annotations

from pathlib import Path

from datasets import ClassLabel, DatasetDict, Features, Value, load_dataset, load_from_disk

SNIPPET_FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})


def load_movie_snippets(folder: str | Path) -> DatasetDict:
    """Load the movie snippets that `scripts/fetch_text_parts.py` wrote: splits train, validation and test."""
    files = {split: Path(folder) / f"{split}.csv" for split in ("train", "validation", "test")}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"Movie snippets not found: missing {', '.join(missing)}. Run `python scripts/fetch_text_parts.py` first and "
            "pass its folder (by default data/text/movie_snippets)."
        )
    paths = {split: str(path) for split, path in files.items()}
    return load_dataset("csv", data_files=paths, features=SNIPPET_FEATURES)


def load_text_dataset(
    dataset_name: str | None = None,
    config_name: str | None = None,
    *,
    train_file: str | None = None,
    validation_file: str | None = None,
    test_file: str | None = None,
    text_column: str = "text",
    label_column: str = "label",
    test_share: float = 0.2,
    seed: int = 42,
) -> DatasetDict:
    """Load a Hub dataset (name, optional config), a folder, or local csv files, normalised to `text` and `label`.

    `label` is a `ClassLabel` in the result, and there are always the splits `train` and `test`. Where no labelled test
    split exists, the validation split becomes it; where neither does, `test_share` of the training rows is split off by
    `seed`. A validation split of its own is kept. Rows without a label (-1 or empty) are dropped.
    """
    files = {"train": train_file, "validation": validation_file, "test": test_file}
    files = {split: path for split, path in files.items() if path is not None}
    if (dataset_name is None) == (train_file is None) or (dataset_name and files):
        raise ValueError(
            f"Received dataset_name={dataset_name!r} and files {files or 'none'}; expected either dataset_name alone or "
            "train_file with optional validation_file and test_file. Drop one of the two."
        )
    if dataset_name is None:
        for path in files.values():
            if not Path(path).is_file():
                raise FileNotFoundError(f"Received the csv file {path!r}, which does not exist; check the path.")
        raw = load_dataset("csv", data_files=files)
    elif (Path(dataset_name) / "dataset_dict.json").is_file():
        raw = load_from_disk(dataset_name)
    else:
        raw = load_dataset(dataset_name, config_name)
    return _with_test_split(_normalise(raw, text_column, label_column), test_share, seed)


def _normalise(raw: DatasetDict, text_column: str, label_column: str) -> DatasetDict:
    """Keep the labelled rows of train, validation and test, with the columns `text` and `label` (ClassLabel)."""
    if "train" not in raw:
        raise ValueError(f"Received the splits {sorted(raw)}; expected one called 'train'. Load another dataset or config.")
    splits = DatasetDict({name: raw[name] for name in ("train", "validation", "test") if name in raw})
    for name, split in splits.items():
        for option, column in (("text_column", text_column), ("label_column", label_column)):
            if column not in split.column_names:
                raise ValueError(
                    f"Split {name!r} has the columns {split.column_names}; expected a column {column!r}. "
                    f"Set {option} to the right one."
                )
    splits = splits.select_columns([text_column, label_column])
    splits = DatasetDict({name: _labelled(split, text_column, label_column) for name, split in splits.items()})
    splits = DatasetDict({name: split for name, split in splits.items() if name == "train" or len(split)})
    if not len(splits["train"]):
        raise ValueError(f"No row of the train split has a label in {label_column!r}. Set label_column to another one.")
    splits = _class_labels(splits, label_column)
    return DatasetDict(
        {
            name: split.rename_columns({old: new for old, new in renames if old != new})
            for renames in [((text_column, "text"), (label_column, "label"))]
            for name, split in splits.items()
        }
    )
