"""What commands read: a split of a saved data set, and the processor saved with a model."""

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_from_disk
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase

from ..errors import InputError
from ..models.loading import has_words


def load_split(folder: str, split: str) -> Dataset:
    """Return a split of a saved dataset. Raises `InputError` when the folder holds no dataset, or not this split."""
    try:
        data = load_from_disk(folder)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(
            "The dataset could not be loaded",
            received=f"{folder!r} ({error})",
            expected="a folder that Dataset.save_to_disk wrote",
            todo="prepare the dataset as for training (tokenized, or with pixel_values) and save it with save_to_disk",
        ) from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise InputError(
                "The dataset does not have this split",
                received=f"--split {split}",
                expected=f"one of {', '.join(data)}",
                todo="pass one of these as --split",
            )
        data = data[split]
    # Images that were saved as lists come back as tensors.
    return data if "input_ids" in data.column_names else data.with_format("torch")


def load_tokenizer(source: str) -> Any:
    """Return the tokenizer saved with a model, which pads the samples, or None if there is none."""
    try:
        found = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return found if has_words(found) else None


def new_folder(folder: str, *kept: str) -> str:
    """Return a folder to write to; `InputError` where it is a file, or one of the models that are read."""
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(Path(other).exists() and path.samefile(other) for other in kept)):
        raise InputError(
            "Nothing can be written there",
            received=f"{folder!r}, which is {'a model that is read' if path.is_dir() else 'a file'}",
            expected="a new folder, or one to write into",
            todo="choose another folder",
        )
    return folder


def positive(text: str) -> int:
    """Return a number of samples; for `argparse`, which says what is wrong."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def load_processor(source: str) -> Any:
    """Return the processor saved with a model (tokenizer, image processor, ...), or None if there is none."""
    try:
        found = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError, AttributeError, ImportError):
        return load_tokenizer(source)
    return None if isinstance(found, PreTrainedTokenizerBase) and not has_words(found) else found
