"""Memory told beforehand: weights are counted where they are, and a step's tensors are those that a training holds."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from makers import assert_same_weights, bert, distiller, gpt2, images, resnet, texts, traces, vit, weights
from tiny import fit, make
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_semckd import SemCKDTrainer, inspect_models
from hf_semckd.files import json_text
from hf_semckd.training.allocations import LiveBytes, StepMemory, measure_step, repeated, stored_bytes
from hf_semckd.training.memory import MemoryEstimate, TrainedBytes, readable, teacher_bytes

LOGGER = "hf_semckd.training.callbacks"
NUMBER = 4


# ---- Counting ------------------------------------------------------------------------------------------------------


def test_live_bytes_are_those_of_tensors_that_are_alive():
    known = torch.ones(1000)
    with LiveBytes([known]) as live:
        first = known * 2
        view = first[:10]
        second = first + known
        del first
        third = second.sum()
        del view
        known.mul_(1)
    counted = NUMBER * 1000
    # The view holds its storage; what is written in place is not new.
    assert live.timeline[0] == live.timeline[1] == counted and live.timeline[2] == 2 * counted
    assert live.timeline[3] == 2 * counted + NUMBER and live.timeline[-1] == counted + NUMBER
    assert third.item() == 3000


def test_a_step_grows_by_what_each_sample_takes_and_ends_with_the_gradients():
    layer, width = nn.Linear(50, 200, bias=False), 50

    def loss_of(samples: int) -> torch.Tensor:
        # Held at most: the outputs, and what tanh keeps, until its gradient is there.
        return layer(inputs[samples]).tanh().sum()

    inputs = {samples: torch.ones(samples, width) for samples in (2, 4)}
    step = measure_step(loss_of, [*layer.parameters(), *inputs.values()], list(layer.parameters()))
    assert layer.weight.grad is None and step.gradients == NUMBER * 50 * 200
    assert 2 * 200 * NUMBER <= step.per_sample <= 3 * 200 * NUMBER
    assert step.peak(1, accumulated=False) == pytest.approx(step.gradients, rel=0.1)
    many = step.peak(10_000, accumulated=False)
    assert many == pytest.approx(10_000 * step.per_sample, rel=0.05)
    assert step.peak(10_000, accumulated=True) == pytest.approx(10_000 * step.per_sample + step.gradients, rel=0.01)


def test_what_is_held_when_gradients_are_there_counts_with_them():
    step = StepMemory(fixed=10, per_sample=5, course=((0.5, 60), (1.0, 0)), gradients=60)
    assert step.peak(2, accumulated=False) == max(0.5 * 20 + 60, 20)
    assert step.peak(100, accumulated=False) == 510 and step.peak(2, accumulated=True) == 80


def test_samples_are_taken_again():
    batch = {"x": torch.arange(3), "name": "text", "count": torch.tensor(3)}
    made = repeated(batch, 4)
    assert made["x"].tolist() == [0, 1, 2, 0] and made["name"] == "text" and made["count"] == 3
    assert repeated(batch, 2)["x"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("make_optimizer", "moments"),
    [
        (torch.optim.AdamW, 2),
        (partial(torch.optim.SGD, lr=0.1), 0),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 1),
    ],
)
def test_the_optimizer_keeps_what_one_of_its_kind_keeps(make_optimizer, moments):
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.BatchNorm1d(10, affine=False), nn.Linear(10, 10))
    model[2].requires_grad_(False)
    found = TrainedBytes.of(model, optimizer=make_optimizer(model[0].parameters()))
    buffers = sum(stored_bytes(entry) for entry in model.buffers())
    assert found == TrainedBytes(NUMBER * 210 + buffers, NUMBER * 100, moments * NUMBER * 100)


def test_an_optimizer_that_cannot_be_tried_is_taken_for_adam():
    class Strange:
        def __init__(self, parameters: Any, impossible: int):
            raise ValueError(impossible)

    strange = object.__new__(Strange)
    strange.defaults = {"impossible": 1}
    assert TrainedBytes.of(nn.Linear(4, 4, bias=False), optimizer=strange).optimizer == 8 * 16


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_the_optimizers_share_is_that_of_trainers_own(optim, tmp_path):
    parts = {"model": bert(2, 64).bfloat16(), "teacher_model": bert(3, 24, seed=9), "train_dataset": texts()}
    trainer = distiller(tmp_path, {"optim": optim, "max_steps": 1}, **parts)
    trainer.create_optimizer()
    found = TrainedBytes.of(trainer.student, optimizer=trainer.optimizer)
    fit(trainer)
    student = {id(entry) for entry in trainer.student.parameters()}
    states = [state for entry, state in trainer.optimizer.state.items() if id(entry) in student]
    kept = sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))
    # Of adafactor's rows and columns, a matrix of one size stands for all.
    assert found.optimizer == pytest.approx(kept, rel=1.0 if optim == "adafactor" else 0.02)


def test_a_teacher_counts_where_it_is_and_once():
    model = bert(2)
    tied = nn.ModuleList([model, model])
    expected = sum(entry.nbytes for entry in (*model.parameters(), *model.buffers()))
    assert teacher_bytes([model, tied]) == {"cpu": expected}
    half = teacher_bytes([bert(2).half()])["cpu"]
    assert expected / 2 <= half < 0.6 * expected
    model.classifier.to("meta")
    assert teacher_bytes([model])["meta"] == sum(NUMBER * entry.numel() for entry in model.classifier.parameters())


def test_sizes_are_read_by_people():
    assert [readable(size) for size in (12, 2048, 5 * 2**20, 3.5 * 2**30)] == ["12 B", "2 KB", "5 MB", "3.5 GB"]


# ---- A training ----------------------------------------------------------------------------------------------------


class Peak(TrainerCallback):
    """Counts the tensors of a training from its beginning to its end, with everything that is made meanwhile."""

    def __init__(self, trainer: SemCKDTrainer):
        self.trainer, self.live = trainer, LiveBytes([])

    def on_train_begin(self, *args: Any, **keywords: Any) -> None:
        models = (self.trainer.student, self.trainer.teacher, self.trainer.feature_loss)
        self.live = LiveBytes([entry for model in models for entry in (*model.parameters(), *model.buffers())])
        self.live.__enter__()

    def on_train_end(self, *args: Any, **keywords: Any) -> None:
        self.live.__exit__(None, None, None)


@contextmanager
def told(caplog: pytest.LogCaptureFixture, estimates: list[MemoryEstimate], trainer: SemCKDTrainer) -> Any:
    """Collect what is told before a training."""
    estimate = trainer.distillation.memory
    trainer.distillation.memory = lambda *args: estimates.append(estimate(*args)) or estimates[-1]
    with caplog.at_level(logging.INFO, logger=LOGGER):
        yield


PAIRS = {
    "bert": (bert, partial(bert, 4, 32, seed=9), partial(texts, 24)),
    "vit": (vit, partial(vit, 4, 32, seed=9), partial(images, 24)),
    "resnet": (resnet, partial(resnet, (16, 24), seed=9), partial(images, 24)),
    "gpt2": (gpt2, partial(gpt2, 4, 32, seed=9), partial(texts, 24, labels="input", types=False)),
}


@pytest.mark.parametrize(
    ("name", "batch", "parts"), [("bert", 12, 1), ("vit", 6, 2), ("resnet", 12, 1), ("gpt2", 12, 1)]
)
def test_the_estimate_is_close_to_what_a_training_holds(name, batch, parts, tmp_path, caplog):
    """From batches of 2 and 4 to a larger one, with the optimizer's state and all that a trainer holds besides."""
    student, teacher, rows = PAIRS[name]
    args = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": parts, "max_steps": 2}
    trainer = distiller(tmp_path, args, model=student(), teacher_model=teacher(), train_dataset=rows())
    peak, estimates = Peak(trainer), list[MemoryEstimate]()
    trainer.add_callback(peak)
    with told(caplog, estimates, trainer):
        fit(trainer)
    (found,) = estimates
    here = found.student.weights + found.projections.weights + sum(found.teacher.values())
    measured = here + max(peak.live.timeline)
    assert found.total == pytest.approx(measured, rel=0.15)
    (line,) = [record.message for record in caplog.records if record.name == LOGGER and "Memory" in record.message]
    assert f"together about {readable(found.total)}" in line and f"{batch} samples at a time" in line


def test_measuring_changes_nothing(tmp_path, caplog):
    """Weights, buffers, teacher statistics and random numbers; the student has dropout and batch normalization."""
    states = []
    for level in (logging.INFO, logging.WARNING):
        trainer = make("resnet", tmp_path, samples=8, per_device_train_batch_size=4, association="learned")
        nn.Module.add_module(trainer.student.classifier, "dropout", nn.Dropout(0.3))
        with caplog.at_level(level, logger=LOGGER):
            fit(trainer)
        states.append({**weights(trainer.student), **weights(trainer.feature_loss), "next": torch.rand(3)})
        assert all(entry.grad is None for entry in trainer.student.parameters()) or level
    states[0].pop("next"), states[1].pop("next")
    assert_same_weights(*states)


def test_outside_a_training_the_student_stays_plain(tmp_path):
    trainer = distiller(tmp_path)
    before = traces(trainer.student), traces(trainer.teacher)
    found = trainer.distillation.memory(4, trainer.args, None)
    assert found.step is not None and found.activations > 0
    assert (traces(trainer.student), traces(trainer.teacher)) == before


def test_a_teacher_that_a_cache_stands_for_is_not_loaded(tmp_path):
    teacher = tmp_path / "teacher"
    vit(3, 24, seed=9).save_pretrained(teacher)
    args = {"teacher_cache_dir": str(tmp_path / "cache"), "max_steps": 3}
    fit(distiller(tmp_path, args, teacher_model=teacher))
    again = distiller(tmp_path, args, teacher_model=teacher)
    found = again.distillation.memory(4, again.args, None)
    assert set(found.teacher) == {"meta"} and found.step is not None
    assert "not loaded, and not counted" in str(found)
    assert found.total == found.student.total + found.projections.total + found.activations
    size = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.arrow"))
    assert found.cache.total == round(12 * found.cache.per_sample)
    assert size == 0 or found.cache.total == pytest.approx(size, rel=0.3)
    assert next(again.pair.cached_teachers[0].model.parameters()).is_meta


def test_what_cannot_be_measured_is_said(tmp_path):
    trainer = distiller(tmp_path)
    trainer.distillation.trial_batch = None
    found = trainer.distillation.memory(4, trainer.args, None)
    assert found.activations is None and "activations not measured (no samples are known" in str(found)
    assert "and activations" in str(found)


def test_a_step_whose_teacher_would_have_to_fill_the_cache_is_not_tried(tmp_path):
    trainer = distiller(tmp_path, {"teacher_cache_dir": str(tmp_path / "cache")})
    found = trainer.distillation.memory(4, trainer.args, None)
    assert found.step is None and found.unmeasured == "the teacher's outputs are not cached yet"


def test_a_student_that_refuses_the_trial_costs_the_estimate_alone(tmp_path, caplog):
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = vit(), vit().config

        def forward(self, pixel_values, labels=None, **others):
            assert len(pixel_values) == 2 or not self.training
            return self.inner(pixel_values, labels=labels, **others)

    args = {"per_device_train_batch_size": 2, "max_steps": 2}
    with caplog.at_level(logging.INFO, logger=LOGGER):
        fit(distiller(tmp_path, args, model=Picky()))
    assert "not measured (a step could not be tried" in caplog.text


# ---- Inspection ----------------------------------------------------------------------------------------------------


def test_an_inspection_tells_the_memory_in_text_and_numbers():
    student, teacher, rows = vit(), vit(3, 24, seed=9), images()
    batch = {name: torch.stack([torch.as_tensor(rows[n][name]) for n in range(2)]) for name in rows[0]}
    before = weights(student)
    report = inspect_models(student, teacher, batch)
    assert_same_weights(before, weights(student))
    own = sum(NUMBER * entry.numel() for entry in student.parameters())
    assert report.memory.student == TrainedBytes(own, own, 2 * own)
    assert "Memory, about" in str(report) and "8 samples at a time" in str(report)
    told = json.loads(json_text(report.memory.summary))
    assert told["total"] == report.memory.total > told["activations"] > 0
