"""What a sample shows a reader: its text, or its picture as a small PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from ..models.images import PIXELS, normalization_of

LONGEST_TEXT = 600
THUMBNAIL = 160


def shown_text(row: Any, processing_class: Any) -> str | None:
    """Return the texts of a sample, or its decoded tokens; None where it has neither."""
    if not isinstance(row, Mapping):
        return None
    found = " | ".join(value for value in row.values() if isinstance(value, str) and value.strip())
    if not found and "input_ids" in row and hasattr(processing_class, "decode"):
        with suppress(TypeError, ValueError, KeyError, IndexError, OverflowError):
            found = str(processing_class.decode(row["input_ids"], skip_special_tokens=True))
    return f"{found[:LONGEST_TEXT]}…" if len(found) > LONGEST_TEXT else found or None


def shown_picture(row: Any, processing_class: Any) -> str | None:
    """Return the image of a sample as a data URI; None where it has none, or without pillow."""
    if not isinstance(row, Mapping):
        return None
    try:
        from PIL import Image
    except ImportError:
        return None
    found = next((value for value in row.values() if isinstance(value, Image.Image)), None)
    if found is None and PIXELS in row:
        pixels = _pixels(np.asarray(row[PIXELS], dtype=np.float64), processing_class)
        found = None if pixels is None else Image.fromarray(pixels)
    if found is None:
        return None
    small = found.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _pixels(values: np.ndarray, processing_class: Any) -> np.ndarray | None:
    """Return normalized pixels (C, H, W) as bytes (H, W, 3); without a processor, stretched."""
    if values.ndim != 3 or values.shape[0] not in (1, 3) or not np.isfinite(values).all():
        return None
    known = normalization_of(processing_class)
    if known is not None and len(known[0]) == len(values):
        mean, deviation = (np.reshape(entry, (-1, 1, 1)) for entry in known)
        values = values * deviation + mean
    else:
        values = (values - values.min()) / max(float(np.ptp(values)), 1e-9)
    return np.broadcast_to(np.uint8(values.clip(0, 1) * 255 + 0.5), (3, *values.shape[1:])).transpose(1, 2, 0).copy()
