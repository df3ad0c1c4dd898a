"""Load text classification data for the examples as a `DatasetDict` with the columns `text` and `label`."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk

SNIPPET_NAMES = ["negative", "positive"]


def load_movie_snippets(folder: str | Path) -> DatasetDict:
    """Load the movie snippets that `scripts/fetch_text_parts.py` wrote: splits train, validation and test."""
    return _load_part(folder, "movie_snippets")


def load_newsgroups(folder: str | Path) -> DatasetDict:
    """Load the newsgroup postings (20 classes) that `scripts/fetch_text_parts.py` wrote, in the same splits."""
    return _load_part(folder, "newsgroups", names_file="labels.json")


def _load_part(folder: str | Path, part: str, names_file: str | None = None) -> DatasetDict:
    files = {split: Path(folder) / f"{split}.csv" for split in ("train", "validation", "test")}
    needed = [*files.values(), *([Path(folder) / names_file] if names_file else [])]
    missing = [str(path) for path in needed if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"Received {str(folder)!r}, which lacks {', '.join(missing)}; expected the folder {part} that "
            f"`python scripts/fetch_text_parts.py` writes (by default data/text/{part}). Run that script first."
        )
    names = json.loads((Path(folder) / names_file).read_text("utf-8")) if names_file else SNIPPET_NAMES
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return load_dataset("csv", data_files={split: str(path) for split, path in files.items()}, features=features)


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
    """Load a Hub dataset (name, optional config), a folder, or local csv files, normalized to `text` and `label`.

    `label` is a `ClassLabel` in the result, and there are always the splits `train` and `test`. Where no labeled
    test split exists, the validation split becomes it; where neither does, `test_share` of the training rows is split
    off by `seed`. A validation split beside a test split is kept. Rows without a text or a label are dropped.
    """
    files = {"train": train_file, "validation": validation_file, "test": test_file}
    files = {split: path for split, path in files.items() if path is not None}
    if (dataset_name is None) == (train_file is None) or (dataset_name and files):
        raise ValueError(
            f"Received dataset_name={dataset_name!r} and files {files or 'none'}; expected either a dataset_name or "
            "csv files, among them train_file. Give one of the two."
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
    return _with_test_split(_normalize(raw, text_column, label_column), test_share, seed)


def _normalize(raw: DatasetDict, text_column: str, label_column: str) -> DatasetDict:
    """Keep the labeled rows of train, validation and test, with the columns `text` and `label` (ClassLabel)."""
    splits = {name: raw[name] for name in ("train", "validation", "test") if name in raw}
    if "train" not in splits:
        raise ValueError(
            f"Received the splits {sorted(raw)}; expected one called 'train'. Choose another dataset or config."
        )
    splits = {name: _two_columns(name, split, text_column, label_column) for name, split in splits.items()}
    splits = {name: split for name, split in splits.items() if len(split)}
    if "train" not in splits:
        raise ValueError(
            f"Received a train split without any row that has both a text in {text_column!r} and a label in "
            f"{label_column!r}; expected some. Set text_column and label_column to the right columns."
        )
    if not isinstance(splits["train"].features["label"], ClassLabel):
        splits = _encode_labels(splits, label_column)
    return DatasetDict(splits)


def _two_columns(name: str, split: Dataset, text_column: str, label_column: str) -> Dataset:
    """Reduce a split to `text` and `label`, without the rows that lack one of them (-1 is a ClassLabel's "none")."""
    for option, column in (("text_column", text_column), ("label_column", label_column)):
        if column not in split.column_names:
            raise ValueError(
                f"Received the columns {split.column_names} in the {name} split; expected one called {column!r}. Set "
                f"{option} to the right column."
            )
    split = split.select_columns([text_column, label_column])
    split = split.rename_columns({text_column: "text", label_column: "label"}).cast_column("text", Value("string"))
    none = (None, -1) if isinstance(split.features["label"], ClassLabel) else (None,)
    return split.filter(lambda text, label: text is not None and label not in none, input_columns=["text", "label"])


def _encode_labels(splits: dict[str, Dataset], label_column: str) -> dict[str, Dataset]:
    """Turn string, integer or boolean labels into one ClassLabel for all splits, its names in sorted order."""
    labels = [label for split in splits.values() for label in split["label"]]
    types = sorted({type(label).__name__ for label in labels})
    if types not in (["str"], ["int"], ["bool"]):
        raise ValueError(
            f"Received labels of type {' and '.join(types)} in {label_column!r}; expected classes, all strings or all "
            "integers. Numbers to regress on are not supported; an empty csv cell turns integers into floats: "
            "remove such rows."
        )
    order = sorted(set(labels))
    index = {label: number for number, label in enumerate(order)}
    feature = ClassLabel(names=[str(label) for label in order])
    return {
        name: split.map(
            lambda batch: {"label": [index[label] for label in batch["label"]]},
            batched=True,
            features=Features({"text": split.features["text"], "label": feature}),
        )
        for name, split in splits.items()
    }


def _with_test_split(splits: DatasetDict, test_share: float, seed: int) -> DatasetDict:
    """Make sure that a test split exists: the validation split, or else a seeded share of the training rows."""
    if "test" in splits:
        return splits
    if "validation" in splits:
        return DatasetDict(train=splits["train"], test=splits["validation"])
    return splits["train"].train_test_split(test_size=test_share, seed=seed)
