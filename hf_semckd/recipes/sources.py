"""The rows of a recipe: from the Hub, a folder or a file, with the splits to train and to evaluate on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Audio, ClassLabel, Dataset, DatasetDict, Image, load_dataset, load_from_disk
from datasets.features import LargeList, List

from ..errors import ConfigurationError, InputError, SourceError, nearest
from .schema import DataOptions
from .sounds import is_sound_folder, load_sound_folder

# How a file is read, by its suffix.
BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
# What is held out of the training rows where there is nothing else to evaluate on.
HELD_OUT_SHARE, HELD_OUT_MOST = 10, 2_000
VALIDATION = ("validation", "valid", "val", "dev", "validation_matched")
# The rows that are chosen, and held out, do not depend on the seed of the training.
SEED = 0


@dataclass(frozen=True)
class Splits:
    """Rows to train on, to evaluate on while training, and for the final table; `test_name` is the latter's split.

    `by_folder` tells whether classes are the names of folders, whose order is that of the alphabet.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    test_name: str
    by_folder: bool = False

    def map(self, change: object) -> Splits:
        """Return the splits with each of them changed; what is one split stays one."""
        train, validation = change(self.train), change(self.validation)  # type: ignore[operator]
        test = validation if self.test is self.validation else change(self.test)  # type: ignore[operator]
        return replace(self, train=train, validation=validation, test=test)


def load_splits(options: DataOptions) -> Splits:
    """Return the splits that the options name; `InputError` for data that are not there or cannot be read."""
    assert options.dataset is not None
    data = load_rows(options.dataset, options.dataset_config)
    train = _split(data, options.train_split, "train_split")
    others = DatasetDict({name: split for name, split in data.items() if name != options.train_split})
    if options.eval_dataset is not None:
        data = load_rows(options.eval_dataset, options.dataset_config)
        # A file of its own is one split, whatever it is called.
        data = DatasetDict({"test": next(iter(data.values()))}) if len(data) == 1 else data
        data = others = DatasetDict({name: numbered_alike(train, split) for name, split in data.items()})
    labeled = [name for name in (*VALIDATION, "test") if name in others and _labeled(others[name], train, options)]
    if options.eval_split is not None:
        validation, name = _split(data, options.eval_split, "eval_split"), options.eval_split
    elif labeled:
        validation, name = others[labeled[0]], labeled[0]
    else:
        if options.eval_dataset is not None:
            raise _no_labels(options.eval_dataset, data)
        count = min(max(1, len(train) // HELD_OUT_SHARE), HELD_OUT_MOST)
        if len(train) < 2:
            raise _too_few(len(train))
        held = train.train_test_split(test_size=count, seed=SEED)
        train, validation, name = held["train"], held["test"], f"{options.train_split} (held out)"
    test = validation
    if options.test_split is not None:
        test, name = _split(data, options.test_split, "test_split"), options.test_split
    elif options.eval_split is None and "test" in labeled:
        test, name = others["test"], "test"
    few = some_rows(validation, options.max_eval_samples)
    table = few if test is validation else some_rows(test, options.max_eval_samples)
    by_folder = _is_media_folder(Path(options.dataset).expanduser(), train)
    return Splits(some_rows(train, options.max_train_samples), few, table, name, by_folder)


def load_rows(source: str, config: str | None = None) -> DatasetDict:
    """Return all splits of what a recipe names as its data."""
    path = Path(source).expanduser()
    if path.suffix.lower() in BUILDERS and not path.exists():
        raise _not_loaded(source, path, FileNotFoundError("no data set of the Hub is named like a file"))
    try:
        if path.is_file():
            builder = _builder(path)
            how = {".tsv": {"delimiter": "\t"}, ".txt": {"sample_by": "paragraph"}}.get(path.suffix.lower(), {})
            return load_dataset(builder, data_files=str(path), **how)
        if path.is_dir() and is_sound_folder(path):
            return load_sound_folder(path)
        if path.is_dir() and _only_texts(path):
            return load_dataset("text", data_dir=str(path), sample_by="paragraph")
        if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
            found = load_from_disk(str(path))
        else:
            found = load_dataset(str(path) if path.is_dir() else source, config)
    except InputError:
        raise
    except Exception as error:  # of any of the readers behind `datasets`
        raise _not_loaded(source, path, error) from error
    return found if isinstance(found, DatasetDict) else DatasetDict(train=found)


def some_rows(data: Dataset, most: int | None) -> Dataset:
    """Return so many rows at most, chosen at random, the same ones every time; all of them for None."""
    return data if most is None or most >= len(data) else data.shuffle(seed=SEED).select(range(most))


def _is_media_folder(path: Path, data: Dataset) -> bool:
    saved = (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()
    return path.is_dir() and not saved and any(isinstance(entry, (Audio, Image)) for entry in data.features.values())


def _only_texts(folder: Path) -> bool:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return bool(files) and all(path.suffix.lower() == ".txt" for path in files)


def _builder(path: Path) -> str:
    builder = BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise InputError(
            "The data file is of an unknown kind",
            received=str(path),
            expected=f"a file that ends in {', '.join(BUILDERS)}",
            todo="convert it, or save a dataset with save_to_disk and name its folder",
        )
    return builder


def _not_loaded(source: str, path: Path, error: Exception) -> SourceError:
    cause: BaseException = error
    while cause.__cause__ is not None:  # the outer ones say only that something went wrong
        cause = cause.__cause__
    said = " ".join(str(cause).split())
    looks_local = path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1 or path.parent.is_dir()
    if looks_local and not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, siblings, 1)
        said = "no such file or folder here" + (f" (is it {path.parent / near[0]}?)" if near else "") + f"; {said}"
    return SourceError(
        "The data set could not be loaded",
        received=f"{source} ({said[:300]})",
        expected="a Hub name, a file, or a folder: of images by class, of csv, json or parquet files, of save_to_disk",
        todo="check the name and the connection; `dataset_config` names a configuration of a Hub dataset",
    )


def _split(data: DatasetDict, name: str, option: str) -> Dataset:
    if name not in data:
        raise ConfigurationError(
            "The data set does not have this split",
            received=f"{option}={name}",
            expected=f"one of {', '.join(map(str, data))}",
            todo=f"set {option} to one of these",
        )
    return data[name]


def numbered_alike(train: Dataset, split: Dataset) -> Dataset:
    """Return rows with their classes numbered as in `train`; `InputError` for a class that it lacks."""
    for name, feature in train.features.items():
        wanted, found = _class_names(feature), _class_names(split.features.get(name))
        if wanted is None or found is None or wanted == found:
            continue
        if unknown := [entry for entry in found if entry not in wanted]:
            raise InputError(
                "The data to evaluate on have classes that those to train on lack",
                received=", ".join(unknown[:5]),
                expected=f"some of {', '.join(wanted[:10])}",
                todo=f"correct the column {name}",
            )
        places = {**{place: wanted.index(entry) for place, entry in enumerate(found)}, -1: -1}
        cells = [_renumbered(cell, places) for cell in split[name]]
        split = split.remove_columns(name).add_column(name, cells, feature=feature)
    return split


def _class_names(feature: Any) -> list[str] | None:
    inner = feature.feature if isinstance(feature, (List, LargeList)) else feature
    return inner.names if isinstance(inner, ClassLabel) else None


def _renumbered(cell: Any, places: Mapping[int, int]) -> Any:
    return [_renumbered(entry, places) for entry in cell] if isinstance(cell, list) else places.get(cell)


def _labeled(data: Dataset, train: Dataset, options: DataOptions) -> bool:
    """Tell whether a split has labels: those of many test splits are -1 on the Hub, or the column is missing."""
    if set(train.column_names) - set(data.column_names):
        return False
    for name, feature in data.features.items():
        if isinstance(feature, ClassLabel) or name in ("label", "labels", options.label_column):
            first = data.select(range(min(len(data), 50)))[name]
            return not len(first) or not all(value in (-1, None) for value in first)
    return True


def _no_labels(source: str, data: DatasetDict) -> InputError:
    return InputError(
        "The data to evaluate on have no split that can be used",
        received=f"{source} with {', '.join(map(str, data))}",
        expected=f"one split, or a labeled one named {', '.join((*VALIDATION, 'test'))}, with the columns to train on",
        todo="set eval_split",
    )


def _too_few(count: int) -> InputError:
    return InputError(
        "There are too few rows to train and to evaluate on",
        received=f"{count} rows in one split",
        expected="at least two",
        todo="add rows, or an eval_dataset",
    )
