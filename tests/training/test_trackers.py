"""Trackers get the association as a picture: a few times, and only the one that records.

Recorded from wandb 0.31.0 and trackio 0.43.0, with which this was tried: `wandb.run`, `wandb.Image(array)` and
`wandb.log(dict)`; `trackio.context_vars.current_run.get()`, `trackio.Image(array)` and `trackio.log(dict)`.
"""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from makers import distiller
from transformers.integrations import TrackioCallback, WandbCallback

from hf_semckd.training.trackers import picture_senders, quarter


class Tracker(ModuleType):
    """The public calls of wandb and trackio that are used, which are nearly the same."""

    def __init__(self, name, records=True):
        super().__init__(name)
        self.logged = []
        self.run = object() if records else None
        self.context_vars = SimpleNamespace(current_run=SimpleNamespace(get=lambda: self.run))

    def Image(self, data):  # noqa: N802
        assert data.dtype == np.uint8 and data.ndim == 3 and data.shape[2] == 3
        return data

    def log(self, entries):
        self.logged.append(entries)


def callback(kind):
    """Return a tracker's callback without its module, which it imports when it is made; it does nothing itself."""
    return type(
        kind.__name__,
        (kind,),
        {
            "__init__": lambda self: None,
            **{name: lambda *_, **__: None for name in dir(kind) if name.startswith("on_")},
        },
    )()


@pytest.fixture(params=[(WandbCallback, "wandb"), (TrackioCallback, "trackio")], ids=["wandb", "trackio"])
def tracker(request, monkeypatch):
    kind, name = request.param
    module = Tracker(name)
    monkeypatch.setitem(sys.modules, name, module)
    return callback(kind), module


def test_a_picture_comes_each_quarter_and_at_the_end(tracker, tmp_path):
    own, module = tracker
    trainer = distiller(tmp_path, args={"max_steps": 8}, callbacks=[own])
    trainer.train()
    assert [entry["train/global_step"] for entry in module.logged] == [2, 4, 6, 8]
    assert all(entry["association"].shape[0] > 50 for entry in module.logged)


def test_a_tracker_that_does_not_record_is_left_alone(tracker, tmp_path):
    own, module = tracker
    module.run = None
    assert picture_senders([own]) == []


def test_a_tracker_that_fails_costs_the_picture_alone(tracker, tmp_path, caplog, monkeypatch):
    own, module = tracker
    monkeypatch.setattr(module, "log", lambda _: 1 / 0)
    trainer = distiller(tmp_path, args={"max_steps": 2}, callbacks=[own])
    assert trainer.train().global_step == 2
    assert "was not sent (training is not affected): division by zero" in caplog.text


def test_a_resumed_training_goes_on_with_its_quarter(tracker, tmp_path):
    own, module = tracker
    args = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5}
    distiller(tmp_path, args=args).train()
    distiller(tmp_path, args=args, callbacks=[own]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert [entry["train/global_step"] for entry in module.logged] == [6, 8]


@pytest.mark.parametrize(
    ("step", "steps", "over"), [(0, 8, 0), (1, 8, 0), (2, 8, 1), (7, 8, 3), (8, 8, 4), (9, 8, 4), (3, 0, 4)]
)
def test_quarters(step, steps, over):
    assert quarter(step, steps) == over


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_nothing_is_imported_for_a_tracker_that_is_not_there(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    assert picture_senders([callback(kind) for kind in (WandbCallback, TrackioCallback)]) == []
