"""What commands read: a split of a saved data set, and the processor saved with a model."""

from typing import Any

from datasets import Dataset, DatasetDict, load_from_disk
from transformers import AutoProcessor, AutoTokenizer

from ..errors import InputError


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
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def load_processor(source: str) -> Any:
    """Return the processor saved with a model (tokenizer, image processor, ...), or None if there is none."""
    try:
        return AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError, AttributeError, ImportError):
        return load_tokenizer(source)
