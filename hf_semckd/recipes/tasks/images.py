"""Classes of images."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import PIL.Image
from datasets import Features, Image
from transformers import default_data_collator

from ...errors import InputError
from ..schema import DataOptions
from .base import Columns, Rows, Task, media_columns


class ImageClassification(Task):
    """One class, several, or a number for an image."""

    name = "image-classification"
    heads = ("ImageClassification",)
    modality = "image"
    lazy = True

    @classmethod
    def find_columns(cls, features: Features, options: DataOptions) -> Columns | None:
        """Return the first column of images, and that of classes."""
        return media_columns(features, options, Image)

    def encode(self, processor: Any, rows: Rows) -> dict[str, Any]:
        """Return pixels as the processor makes them."""
        pictures = [_in_color(_opened(picture)) for picture in rows[self.columns.inputs[0]]]
        pixels = processor(pictures, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": self.labels(rows)}

    def collator(self, processor: Any, model: Any) -> Callable[[list[Any]], Mapping[str, Any]]:
        """Return one that stacks."""
        return default_data_collator


def _opened(cell: Any) -> Any:
    """Return a picture, of `{bytes, path}` as `datasets` keeps it."""
    if not isinstance(cell, Mapping):
        return cell
    try:
        picture = PIL.Image.open(cell["path"] if cell.get("bytes") is None else io.BytesIO(cell["bytes"]))
        picture.load()
        return picture
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(
            "A picture cannot be read",
            received=f"{cell.get('path')} ({error})",
            expected="a whole PNG, JPEG or other image file",
            todo="convert or remove it",
        ) from error


def _in_color(picture: Any) -> Any:
    if picture.mode.startswith("I"):  # 16 bits, which `convert` would cut off at 255
        picture = PIL.Image.fromarray((np.asarray(picture) // 256).astype("uint8"))
    return picture.convert("RGB")
