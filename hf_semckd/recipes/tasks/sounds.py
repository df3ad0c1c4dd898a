"""Classes of sounds."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from datasets import Audio, Features
from transformers import DataCollatorWithPadding

from ...errors import InputError, MissingDependencyError
from ..schema import DataOptions
from .base import Columns, Rows, Task, media_columns


class AudioClassification(Task):
    """One class for a sound, of which at most `length` seconds are heard."""

    name = "audio-classification"
    heads = ("AudioClassification", "SequenceClassification")
    modality = "audio"
    lazy = True

    @classmethod
    def find_columns(cls, features: Features, options: DataOptions) -> Columns | None:
        """Return the first column of sounds, and that of classes."""
        return media_columns(features, options, Audio)

    def encode(self, processor: Any, rows: Rows) -> dict[str, Any]:
        """Return sounds as the processor makes them, at its sampling rate."""
        rate = processor.sampling_rate
        sounds = [read_sound(cell, rate)[: self.length * rate] for cell in rows[self.columns.inputs[0]]]
        # The attention mask, where there is one, is made with the padding, batch by batch.
        found = processor(sounds, sampling_rate=rate)
        inputs = {name: found[name] for name in ("input_values", "input_features") if name in found}
        return {**inputs, "labels": self.labels(rows)}

    def collator(self, processor: Any, model: Any) -> Callable[[list[Any]], Mapping[str, Any]]:
        """Return one that pads to the longest sound of a batch."""
        return DataCollatorWithPadding(processor)


def read_sound(cell: Mapping[str, Any], rate: int) -> np.ndarray:
    """Return a sound, `{bytes, path}` or `{array, sampling_rate}`, as one channel at a sampling rate in Hz.

    Raises `MissingDependencyError` without soundfile or, for another rate, scipy; `InputError` for what is no sound.
    """
    if "array" in cell:
        return _resampled(np.asarray(cell["array"], dtype=np.float32), int(cell["sampling_rate"]), rate)
    try:
        import soundfile
    except ImportError as error:
        raise _missing("soundfile") from error
    source = cell["path"] if cell.get("bytes") is None else io.BytesIO(cell["bytes"])
    try:
        sound, found = soundfile.read(source, dtype="float32", always_2d=True)
    except (RuntimeError, OSError, TypeError) as error:
        raise InputError(
            "A sound cannot be read",
            received=f"{cell.get('path')} ({error})",
            expected="a WAV, FLAC, OGG or MP3 file",
            todo="convert or remove it",
        ) from error
    return _resampled(sound.mean(1), found, rate)


def _resampled(sound: np.ndarray, found: int, rate: int) -> np.ndarray:
    if found == rate:
        return sound
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise _missing("scipy") from error
    common = int(np.gcd(found, rate))
    return resample_poly(sound, rate // common, found // common).astype(np.float32)


def _missing(name: str) -> MissingDependencyError:
    return MissingDependencyError(
        "Sounds need soundfile, and scipy where their sampling rate is changed",
        received=f"an environment in which {name} cannot be imported",
        expected=name,
        todo='pip install "hf-semckd[audio]"',
    )
