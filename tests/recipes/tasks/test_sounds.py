"""Sounds of any rate and number of channels become one channel at the processor's rate."""

import io

import numpy as np
import pytest
import soundfile
from datasets import Audio, ClassLabel, Features, Value
from transformers import Wav2Vec2FeatureExtractor

from hf_semckd.errors import InputError, MissingDependencyError
from hf_semckd.recipes.classes import Classes
from hf_semckd.recipes.schema import DataOptions
from hf_semckd.recipes.tasks.base import Columns
from hf_semckd.recipes.tasks.sounds import AudioClassification, read_sound

RATE = 8000


def tone(rate, seconds=0.5, pitch=440.0):
    return np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate).astype(np.float32)


def file_of(sound, rate, kind="WAV"):
    made = io.BytesIO()
    soundfile.write(made, sound, rate, format=kind)
    return {"bytes": made.getvalue(), "path": None}


@pytest.mark.parametrize("rate", [RATE, 16000, 22050, 4000])
@pytest.mark.parametrize("way", ["file", "array"])
def test_a_tone_is_the_same_tone_at_the_wanted_rate(rate, way):
    cell = file_of(tone(rate), rate) if way == "file" else {"array": tone(rate).tolist(), "sampling_rate": rate}
    found, expected = read_sound(cell, RATE), tone(RATE)
    assert found.dtype == np.float32 and len(found) == len(expected)
    # At the ends a filter has nothing to look at.
    assert np.abs(found - expected)[200:-200].max() < 0.02


def test_channels_are_averaged():
    left, right = tone(RATE), tone(RATE, pitch=300)
    found = read_sound(file_of(np.stack([left, right], 1), RATE), RATE)
    np.testing.assert_allclose(found, (left + right) / 2, atol=1e-4)


@pytest.mark.parametrize("kind", ["FLAC", "OGG"])
def test_other_kinds_of_files_are_read_from_their_path(tmp_path, kind):
    path = tmp_path / f"a.{kind.lower()}"
    soundfile.write(path, tone(RATE), RATE, format=kind)
    assert len(read_sound({"bytes": None, "path": str(path)}, RATE)) == len(tone(RATE))


def test_what_is_no_sound_is_refused(tmp_path):
    path = tmp_path / "a.wav"
    path.write_text("no sound")
    for cell in ({"bytes": None, "path": str(path)}, {"bytes": b"x", "path": "a.wav"}, {"bytes": None, "path": None}):
        with pytest.raises(InputError, match="A sound cannot be read"):
            read_sound(cell, RATE)


@pytest.mark.parametrize("missing", ["soundfile", "scipy.signal"])
def test_a_missing_package_is_named(monkeypatch, missing):
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    with pytest.raises(MissingDependencyError, match=r"(?s)scipy.*hf-semckd\[audio\]"):
        read_sound(file_of(tone(16000), 16000), RATE)


@pytest.mark.parametrize(
    ("features", "options", "expected"),
    [
        ({"audio": Audio(), "label": ClassLabel(names=["a"])}, {}, ("audio", "label")),
        ({"file": Value("string"), "x": Audio(), "intent": Value("int64")}, {}, ("x", "intent")),
        ({"audio": Audio(), "text": Value("string")}, {}, None),
        ({"audio": Audio(), "text": Value("string")}, {"label_column": "text"}, ("audio", "text")),
    ],
)
def test_columns_are_found(features, options, expected):
    found = AudioClassification.find_columns(Features(features), DataOptions(**options))
    assert (found and found.all) == expected


def test_samples_are_cut_off_and_padded_batch_by_batch():
    processor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=False, return_attention_mask=True)
    task = AudioClassification(Columns(("audio",), "label"), Classes(("a", "b"), "single", (0, 1)), DataOptions(), 1)
    sounds = [tone(RATE, 2.5), tone(RATE, 0.25)]
    found = task.encode(processor, {"audio": [file_of(sound, RATE) for sound in sounds], "label": [1, 0]})
    assert [len(values) for values in found["input_values"]] == [RATE, RATE // 4]
    np.testing.assert_allclose(found["input_values"][1], sounds[1], atol=1e-4)
    samples = [{name: values[row] for name, values in found.items()} for row in range(2)]
    batch = task.collator(processor, None)(samples)
    assert batch["input_values"].shape == (2, RATE) and batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].sum(1).tolist() == [RATE, RATE // 4]
