"""Training data without a length: it trains as data with one does, and what cannot work is refused in words."""

from __future__ import annotations

import dataclasses
import math
from itertools import count
from typing import Any
from unittest import mock

import pytest
from datasets import Dataset
from makers import Stream, config
from tiny import PROBLEMS, assert_same, fit, make, outcome, pictures, sentences, train
from torch import Tensor
from torch.utils.data import IterableDataset

from hf_semckd.errors import CheckpointError, ConfigurationError
from hf_semckd.training.caching import TrainingData
from hf_semckd.training.streams import batches_to_read, check_equal_sizes

CUT = {"per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 3}


def from_hub(count: int, shards: int = 1) -> Any:
    """Return sentences as `load_dataset(streaming=True)` gives them."""
    return Dataset.from_list(sentences(count, "class").rows).to_iterable_dataset(num_shards=shards)


def test_a_stream_of_datasets_trains_as_its_rows_do(tmp_path):
    done = train("sentences", tmp_path, train_dataset=from_hub(12), **CUT)
    assert_same(done, train("sentences", tmp_path, samples=12, **CUT))


@pytest.mark.slow
def test_several_workers_share_a_stream(tmp_path):
    """Each of two reads every other sample, and they give a batch in turn."""
    rows = pictures(16)
    places = [*range(0, 8, 2), *range(1, 9, 2), *range(8, 16, 2), *range(9, 17, 2)]
    args = {**CUT, "max_steps": 4, "dataloader_num_workers": 2}
    ordered = dataclasses.replace(PROBLEMS["vit"], rows=lambda _: type(rows)([rows[place] for place in places]))
    done = train("vit", tmp_path, train_dataset=Stream(rows), **args)
    assert_same(done, train(ordered, tmp_path, **{**args, "dataloader_num_workers": 0}))


def resumed(folder: Any, skips: bool, **changes: Any) -> Any:
    """Train with a checkpoint after two steps, and go on from there with fresh objects."""
    saves = {**CUT, "save_strategy": "steps", "save_steps": 2, "logging_strategy": "no", **changes}
    whole = make("vit", folder, **saves)
    fit(whole)
    again = make("vit", folder, ignore_data_skip=not skips, **saves)
    fit(again, resume_from_checkpoint=str(folder / "checkpoint-2"))
    return outcome(whole).state, outcome(again).state


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return how far two states are apart."""
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


def test_a_stream_resumes_at_its_place(tmp_path):
    assert far(*resumed(tmp_path, True, train_dataset=Stream(pictures(12)))) == 0


def test_a_stream_that_had_begun_again_resumes_from_its_beginning_alone(tmp_path):
    with pytest.raises(CheckpointError, match="ignore_data_skip=True"):
        resumed(tmp_path, True, train_dataset=Stream(pictures(4)))
    # Every pass is one step of the same samples.
    assert far(*resumed(tmp_path, False, train_dataset=Stream(pictures(4)))) == 0


def test_a_stream_that_ended_with_its_training_can_be_gone_on_with(tmp_path):
    saves = {"train_dataset": Stream(pictures(8)), "per_device_train_batch_size": 4, "save_strategy": "steps"}
    fit(make("vit", tmp_path, max_steps=2, save_steps=2, **saves))
    again = make("vit", tmp_path, max_steps=3, **saves)
    fit(again, resume_from_checkpoint=True)
    assert again.state.global_step == 3


class Endless(IterableDataset):
    """Pictures without an end."""

    def __iter__(self) -> Any:
        rows = pictures(8)
        return (rows[place % 8] if place < 100 else pytest.fail("read on and on") for place in count())


def test_a_cache_is_filled_with_what_training_reads_of_an_endless_stream(tmp_path):
    trainer = make("vit", tmp_path, train_dataset=Endless(), teacher_cache_dir=str(tmp_path / "cache"), **CUT)
    assert trainer.fill_teacher_cache() == 8
    fit(trainer)
    assert trainer.pair.cached_teachers[0].computed == 8


@pytest.mark.parametrize(
    ("steps", "accumulated", "train_size", "eval_size", "workers"), [(3, 2, 4, 5, 0), (7, 1, 3, 8, 2)]
)
def test_the_batches_of_a_stream_hold_what_training_reads(
    steps, accumulated, train_size, eval_size, workers, tmp_path
):
    args = config(
        tmp_path,
        max_steps=steps,
        gradient_accumulation_steps=accumulated,
        per_device_train_batch_size=train_size,
        per_device_eval_batch_size=eval_size,
        dataloader_num_workers=workers,
    )
    needed = math.ceil(steps * accumulated * train_size / eval_size)
    assert batches_to_read(Stream(pictures(2)), args) == needed + workers
    assert batches_to_read(pictures(2), args) is None


@pytest.mark.parametrize(
    ("dispatches", "world", "data", "refused"),
    [
        (None, 2, Stream(sentences(2, "class")), True),
        (True, 2, Stream(sentences(2, "class")), True),
        (False, 2, Stream(sentences(2, "class")), False),
        (None, 1, Stream(sentences(2, "class")), False),
        (None, 2, sentences(2, "class"), False),
        (None, 2, Stream(pictures(2)), False),
    ],
)
def test_samples_that_one_process_could_not_deal_out_are_refused(dispatches, world, data, refused, tmp_path):
    args = config(tmp_path, accelerator_config={"dispatch_batches": dispatches})
    collator = PROBLEMS["sentences" if "input_ids" in next(iter(data)) else "vit"].collator
    with mock.patch.object(type(args), "world_size", world):
        if not refused:
            check_equal_sizes(TrainingData(data, collator, lambda batch: batch, frozenset()), args)
            return
        with pytest.raises(ConfigurationError, match="dispatch_batches"):
            check_equal_sizes(TrainingData(data, collator, lambda batch: batch, frozenset()), args)
