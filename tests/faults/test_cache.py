"""A damaged or made-up teacher cache is made again or refused in words; nothing large is allocated for it."""

from __future__ import annotations

import json
import logging
import random
import resource
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from fault_counts import ALONE
from makers import assert_same_weights, distiller, vit, weights
from torch import Tensor
from transformers import TrainerCallback

from hf_semckd.errors import TeacherOutputError
from hf_semckd.teacher.cache.shard import SCHEMA, Buffer, _checksum, write
from hf_semckd.teacher.cache.store import TensorStore

pytestmark = pytest.mark.faults
# The teacher rounds otherwise where it is given fewer samples at a time, which Adam would make steps of.
STEPS = {"max_steps": 6, "optim": "sgd"}
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
# Far above what these trainings take, and far below what is asked for.
MOST_BYTES = 400 * 2**20


def trained(folder: Path, cache: Path | None, teacher: Any = None) -> Any:
    """Return a trainer that has trained, with or without a cache."""
    args = STEPS if cache is None else {**STEPS, "teacher_cache_dir": str(cache)}
    trainer = distiller(folder, args, teacher_model=vit(3, 24, seed=9) if teacher is None else teacher)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Return the weights that the teacher itself leads to."""
    return weights(trained(tmp_path_factory.mktemp("plain"), None).student)


@pytest.fixture
def source(tmp_path):
    """Return the folder of a teacher, of which notes are kept."""
    vit(3, 24, seed=9).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


@pytest.fixture
def cache(tmp_path, source):
    """Return a full cache."""
    trained(tmp_path / "first", tmp_path / "cache", source)
    return tmp_path / "cache"


def lines(caplog: Any) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train_again(caplog: Any, tmp_path: Path, cache: Path, source: str, expected: Any) -> list[str]:
    """Train on a damaged cache, in the memory that it takes otherwise, to the same end; return what was said."""
    caplog.clear()
    before = peak()
    trainer = trained(tmp_path / "again", cache, source)
    torch.testing.assert_close(weights(trainer.student), expected, **CLOSE)
    assert peak() - before < MOST_BYTES
    return lines(caplog)


@pytest.mark.parametrize("which", ["rows", "manifest"])
def test_any_damage_of_a_cache_is_made_good(which, faults, cache, source, expected, tmp_path, caplog):
    draw = random.Random(0)
    (path,) = cache.rglob("rows-*.arrow" if which == "rows" else "manifest.json")
    content = path.read_bytes()
    flips = [draw.randrange(len(content)) for _ in range(8 if which == "rows" else 4)]
    damages = {"deleted": None, "emptied": b"", "cut in half": content[: len(content) // 2]}
    for place in flips:
        damages[f"with byte {place} flipped"] = content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
    for damage, changed in damages.items():
        for other in cache.rglob("rows-*.arrow") if which == "rows" else ():
            other.unlink()
        if changed is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(changed)
        kind = "with a byte flipped" if "flipped" in damage else damage
        with faults.survived(f"cache file {kind}", ALONE):
            said = train_again(caplog, tmp_path, cache, source, expected)
            assert len(said) <= 1, said


def shard_of(cache: Path) -> tuple[Path, list[bytes], list[dict[str, Tensor]]]:
    """Return the one file of a cache with its keys and rows."""
    (path,) = cache.rglob("rows-*.arrow")
    store = TensorStore(path.parent)
    keys = list(store._index)
    rows = [{name: value.clone() for name, value in row.items()} for row in store.read(keys)]
    store.close()
    return path, keys, rows


def without(row: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in row.items() if key != name}


MADE_UP = {
    "other classes": lambda row: {**row, "logits": torch.zeros(2**20)},
    "no logits": lambda row: without(row, "logits"),
    "no features": lambda row: {"logits": row["logits"]},
    "more layers": lambda row: {**row, "99.mean": torch.zeros(24)},
    "other channels": lambda row: {
        **{name: v.repeat_interleave(2, -1) for name, v in row.items()},
        "logits": row["logits"],
    },
    "other types": lambda row: {**{name: v.int() for name, v in row.items()}, "logits": row["logits"]},
    "other names": lambda row: {f"x{name}": value for name, value in row.items()},
    "nothing": lambda row: {},
}


@pytest.mark.parametrize("which", ["all", "one"])
@pytest.mark.parametrize("what", MADE_UP)
def test_rows_of_another_kind_are_made_again(what, which, faults, cache, source, expected, tmp_path, caplog):
    path, keys, rows = shard_of(cache)
    rows = [MADE_UP[what](row) if which == "all" or not number else row for number, row in enumerate(rows)]
    buffer = Buffer()
    for key, row in zip(keys, rows, strict=True):
        buffer.add(key, row)
    with pa.OSFile(str(path), "wb") as file:
        write(buffer.batch(), file)
    with faults.survived("made-up rows in the cache", ALONE):
        said = train_again(caplog, tmp_path, cache, source, expected)
        assert said and all("made again" in line for line in said), said


LAYOUTS = {
    "huge shape": [["logits", "float32", [2**40]]],
    "shape that overflows": [["logits", "float32", [2**40, 2**40]]],
    "huge and empty": [["logits", "float32", [2**40, 0]]],
    "negative": [["logits", "float32", [-3]]],
    "no type": [["logits", "load", [3]]],
    "no list": {"logits": 3},
    "text": "logits",
}


@pytest.mark.parametrize("what", LAYOUTS)
def test_layouts_that_cannot_be_are_made_again(what, faults, cache, source, expected, tmp_path, caplog):
    """With the checksum of what they say."""
    path, _, _ = shard_of(cache)
    with pa.memory_map(str(path)) as file:
        columns = pa.ipc.open_file(file).read_all().to_pydict()
    text = json.dumps(LAYOUTS[what])
    columns["layout"] = [text] * len(columns["key"])
    columns["checksum"] = [_checksum(k, text, row) for k, row in zip(columns["key"], columns["row"], strict=True)]
    with pa.OSFile(str(path), "wb") as file:
        write(pa.RecordBatch.from_pydict(columns, schema=SCHEMA), file)
    with faults.survived("made-up layout in the cache", ALONE):
        said = train_again(caplog, tmp_path, cache, source, expected)
        assert said and all("made again" in line for line in said), said


NOTES = {
    "channels": {"specs": {"channels": 10**9}},
    "length": {"specs": {"length": 2**23}},
    "grid": {"specs": {"length": 2**23, "grid": [2**11, 2**11]}},
    "logits": {"logits": [2**23]},
    "tokens": {"tokens": 2**23},
    "layers": {"layers": [1] * 10**6},
}


@pytest.mark.parametrize("what", NOTES)
def test_a_made_up_note_takes_no_memory(what, faults, cache, source, expected, tmp_path, caplog):
    (path,) = cache.rglob("manifest.json")
    notes = json.loads(path.read_text())
    for note in notes.values():
        for spec in note["specs"]:
            spec.update(NOTES[what].get("specs", {}))
        note.update({name: value for name, value in NOTES[what].items() if name != "specs"})
    path.write_text(json.dumps(notes))
    with faults.survived("made-up note beside the cache", ALONE):
        train_again(caplog, tmp_path, cache, source, expected)


class Broken(TrainerCallback):
    """Lets a teacher give NaN from a step on."""

    def __init__(self, teacher: Any):
        self.teacher = teacher

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.teacher.classifier.register_forward_hook(lambda _, inputs, output: output * float("nan"))


def test_what_is_not_finite_is_never_stored(faults, expected, tmp_path):
    teacher, settings = vit(3, 24, seed=9), {**STEPS, "teacher_cache_dir": str(tmp_path / "cache")}
    trainer = distiller(tmp_path / "broken", settings, teacher_model=teacher, callbacks=[Broken(teacher)])
    with faults.refused("teacher not finite, with a cache", "logits", error=TeacherOutputError):
        trainer.train()
    assert_same_weights(expected, weights(trained(tmp_path / "healthy", tmp_path / "cache").student))
