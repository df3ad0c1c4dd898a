"""Two real processes (torchrun, gloo) train as one does: weights, projections, statistics and logged terms.

One launch runs all jobs of `distributed_worker`; every test compares one of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed_worker import ACCUMULATED, JOBS, PUBLISHED, WHOLE, read
from launching import WORLD, assert_launched, launch_once
from tiny import PROBLEMS, Outcome, assert_same, by_hand, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def results(tmp_path_factory: Any, request: Any) -> Path:
    """The folder of one launch that runs all jobs."""
    return launch_once("distributed_worker.py", "two-processes", tmp_path_factory, request)


def by_one(job: str, folder: Path) -> Any:
    """Return the training of a job by hand: the same micro-batches, in one process."""
    problem, _, how = job.partition("-")
    micro, parts = WHOLE if how == "whole" else ACCUMULATED
    changes = dict(JOBS[job].keywords)
    kept = {key: changes[key] for key in ("samples", "terms", "association") if key in changes}
    return by_hand(problem, folder, micro=micro, parts=parts * WORLD, **kept)


def test_two_processes_took_part(results):
    assert_launched(results)


@pytest.mark.parametrize("job", [job for job in JOBS if job not in ("vit-published", "resnet-cnns", "vit-evaluated")])
def test_two_processes_train_as_one_does_by_hand(job, results, tmp_path):
    done, world = read(results, job)
    assert world == WORLD
    assert_same(done, by_one(job, tmp_path), PROBLEMS[job.partition("-")[0]].tolerance)


def test_two_processes_train_as_one_does_with_a_batch_of_eight(results, tmp_path):
    """The library against itself, without a hand in between: 2 processes x 4, and x 2 accumulated x 2."""
    alone = {"relation_weight": 0.0}
    one = train("vit", tmp_path, samples=24, per_device_train_batch_size=8, **alone)
    assert_same(read(results, "vit-whole-alone")[0], one)
    one = train("vit", tmp_path, samples=20, per_device_train_batch_size=4, gradient_accumulation_steps=2, **alone)
    assert_same(read(results, "vit-accumulated-alone")[0], one)


def test_two_processes_train_the_published_form_as_accumulation_does(results, tmp_path):
    """Similarity rows and BatchNorm are those of a micro-batch; only running averages know which process saw it."""
    cut = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": WORLD}
    one, two = train("vit", tmp_path, samples=32, **cut, **PUBLISHED), read(results, "vit-published")[0]
    assert_same(without_running_averages(two), without_running_averages(one))


def test_two_processes_train_between_cnns_as_accumulation_does(results, tmp_path):
    """The BatchNorm of student and decoders is that of a micro-batch, and so are matched weights."""
    micro, parts = WHOLE
    cut = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": parts * WORLD}
    one = train("resnet", tmp_path, samples=24, association=None, **cut)
    two, world = read(results, "resnet-cnns")
    assert world == WORLD and any(name.startswith("calibration.decoder.") for name in one.state), sorted(one.state)
    assert_same(without_running_averages(two), without_running_averages(one))


def test_two_processes_do_not_drift_apart_when_evaluation_comes_between(results):
    """The processes themselves compare what they hold, bit by bit."""
    done, world = read(results, "vit-evaluated")
    assert world == WORLD and all(value.isfinite().all() for value in done.state.values())


def without_running_averages(done: Outcome) -> Outcome:
    """Return the outcome without BatchNorm's buffers."""
    kept = {name: value for name, value in done.state.items() if "running_" not in name and "num_batches" not in name}
    return Outcome(kept, done.terms)
