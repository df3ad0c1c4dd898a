"""Tells what a recipe will do, and what it will take: `--dry-run` and `hf-semckd plan`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import datasets

from ..config import SemCKDConfig
from ..data.batches import collate
from ..data.samples import first_samples
from ..errors import ConfigurationError
from ..models.tables import aligned_lines
from ..training.memory import readable
from ..training.report import inspect_models
from .check import check_teacher
from .estimates import CacheCost, Cost, cache_cost, student_cost, teacher_cost
from .folder import RunFolder
from .prepare import prepare
from .progress import Voice, duration
from .reading import Reading
from .rows import read_rows
from .training import Prepared, total_steps

# Times from a few steps differ by that much.
NOISE = 0.1


@dataclass(frozen=True)
class Plan:
    """What a training takes with the teacher run in every step, and with its outputs cached.

    Attributes:
        samples, epochs, steps: Of the training.
        step: Cost of a step with the teacher.
        cache: Cost with a cache; None where nothing can be cached.
        teacher: Cost of a step of fine-tuning the teacher, and how many there are; None where it is fine-tuned.
    """

    samples: int
    epochs: float
    steps: int
    step: Cost
    cache: CacheCost | None
    teacher: tuple[Cost, int] | None

    @property
    def seconds(self) -> dict[str, float]:
        """The time of the student's training, live and cached."""
        found = {"live": self.steps * self.step.seconds}
        if self.cache is not None:
            found["cached"] = self.samples * self.cache.seconds + self.steps * self.cache.step.seconds
        return found

    @property
    def summary(self) -> dict[str, Any]:
        """All of this, for JSON."""
        memory = None if self.step.memory is None else self.step.memory.summary
        return {**vars(self), "seconds": self.seconds, "memory": memory, "advice": self.advice}

    @property
    def advice(self) -> str:
        """Which of both to choose."""
        if self.cache is None:
            return "Run the teacher in every step: its outputs cannot be cached here."
        live, cached = self.seconds["live"], self.seconds["cached"]
        disk = readable(self.samples * self.cache.bytes)
        if cached < (1 - NOISE) * live:
            return f"Set teacher_cache_dir: {duration(live - cached)} are saved, for {disk} of disk."
        return f"Leave teacher_cache_dir out: a cache of {disk} saves little time or none in so few epochs."


def preview(reading: Reading, voice: Voice) -> Plan:
    """Print the data, the layers and how they are compared, parameters, memory and time; nothing stays on disk."""
    _check_alone(reading.args, "hf-semckd distill recipe.yaml --dry-run")
    assert reading.args.output_dir is not None
    RunFolder(reading.args.output_dir).check(reading.options)
    with _trial_folder() as folder:
        prepared = _prepared(reading, folder, voice)
        if not reading.recipe.models.teacher_epochs:
            check_teacher(prepared, reading.args.per_device_eval_batch_size, voice)
        batch = collate(prepared.samples.collator, first_samples(prepared.samples.splits.train))
        names = prepared.teachers if len(prepared.teachers) > 1 else prepared.teachers[0]
        args = reading.args
        layers = {"student_layers": args.student_layers, "teacher_layers": args.teacher_layers}
        found = inspect_models(prepared.student, names, batch, processing_class=prepared.samples.processor, **layers)
        # Of memory the trial training tells more.
        voice.text(f"\n{replace(found, memory=None)}\n")
        made = make_plan(reading, prepared, cached=False)
    _tell_cost(made, voice)
    voice("files", f"will be in {args.output_dir}; nothing was written now")
    return made


def plan(reading: Reading, samples: int | None, tokens: float | None, voice: Voice) -> Plan:
    """Measure a few steps, with and without a teacher cache, and print what training on so much data takes."""
    _check_alone(reading.args, "hf-semckd plan recipe.yaml")
    with _trial_folder() as folder:
        prepared = _prepared(reading, folder, voice)
        if tokens is not None:
            samples = max(1, round(tokens / prepared.samples.length))
        made = make_plan(reading, prepared, cached=True, samples=samples)
    voice.text("")
    rows = [("teacher", "time", "a step", "disk")]
    for name, seconds in made.seconds.items():
        step = made.step if name == "live" or made.cache is None else made.cache.step
        disk = readable(made.samples * made.cache.bytes) if made.cache and name == "cached" else "-"
        rows.append((name, duration(seconds), f"{1000 * step.seconds:,.0f} ms", disk))
    voice.text("\n".join(aligned_lines(rows)) + "\n")
    voice("measured", _constants(made, prepared.samples.length if tokens is not None else None))
    _tell_cost(made, voice)
    voice("advice", made.advice)
    return made


def make_plan(reading: Reading, prepared: Prepared, *, cached: bool, samples: int | None = None) -> Plan:
    """Measure what a training over so many samples takes; None means those of the data."""
    recipe, args = reading.recipe, reading.args
    count = samples or len(prepared.samples.splits.train)
    epochs = args.num_train_epochs
    own = None
    if recipe.models.teacher_epochs:
        own = teacher_cost(args, prepared), total_steps(args, count, recipe.models.teacher_epochs, limited=False)
    return Plan(
        samples=count,
        epochs=epochs,
        # A number of samples that is asked for counts, and not the steps of the recipe.
        steps=total_steps(args, count, epochs, limited=samples is None),
        step=student_cost(recipe, args, prepared),
        cache=cache_cost(recipe, args, prepared) if cached else None,
        teacher=own,
    )


def _constants(made: Plan, length: int | None) -> str:
    """Say what was measured, of which all else is calculated."""
    said = [f"a step {1000 * made.step.seconds:,.0f} ms with the teacher"]
    if made.cache is not None:
        said.append(f"{1000 * made.cache.step.seconds:,.0f} ms from the cache")
        said.append(f"to fill it {1000 * made.cache.seconds:,.1f} ms and {readable(made.cache.bytes)} a sample")
    each = "" if length is None else f" of {length:,} tokens"
    return f"{', '.join(said)}\ncalculated for {made.samples:,} samples{each}, num_train_epochs {made.epochs:g}"


def _check_alone(args: SemCKDConfig, command: str) -> None:
    """Refuse several processes: each would have a trial folder of its own, and the others' student is in none."""
    if args.world_size > 1:
        raise ConfigurationError(
            "A training is planned in one process",
            received=f"{args.world_size} processes",
            expected="one; the training itself may run in several",
            todo=f"leave out `accelerate launch` or torchrun: {command}",
        )


@contextmanager
def _trial_folder() -> Iterator[str]:
    """Give a folder that goes; samples, which `datasets` would keep beside the rows, go with the process."""
    caches = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield folder
    finally:
        if caches:
            datasets.enable_caching()


def _prepared(reading: Reading, folder: str, voice: Voice) -> Prepared:
    rows = read_rows(reading.recipe, voice)
    return prepare(reading.recipe, reading.args, RunFolder(folder), rows, voice, trial=True)


def _tell_cost(made: Plan, voice: Voice) -> None:
    memory = made.step.memory
    if memory is not None:
        voice("memory", "\n".join(aligned_lines(memory.rows())))
    if made.step.peak_bytes is not None:
        voice("" if memory else "memory", f"{readable(made.step.peak_bytes)} at most in the measured steps")
    seconds = made.steps * made.step.seconds
    voice("time", f"{duration(seconds)}: {made.steps:,} steps of {1000 * made.step.seconds:,.0f} ms on this machine")
    if made.teacher is not None:
        cost, steps = made.teacher
        before = f"{duration(steps * cost.seconds)} before that: {steps:,} steps of {1000 * cost.seconds:,.0f} ms"
        voice("", f"{before} to fine-tune the teacher")
