"""Runs a recipe: trains the student, evaluates it, and writes all that is told of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import SemCKDConfig
from ..errors import SemCKDError
from ..evaluation.evaluate import evaluate
from ..evaluation.export import export_onnx
from ..evaluation.table import Evaluation
from ..training.trainer import DistillationTrainer
from .folder import ONNX, RunFolder
from .prepare import prepare
from .progress import Voice, use_progress
from .reading import Reading
from .rows import read_rows
from .schema import Recipe
from .training import Prepared, student_trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: the student's folder, the deploy table, and the pages and files beside them."""

    student: str
    auto_class: str
    evaluation: Evaluation | None
    report: str | None
    onnx: tuple[str, ...]
    problems: tuple[str, ...]


def run_recipe(reading: Reading, voice: Voice) -> Outcome:
    """Do what a recipe says. What an earlier run of it has done already is not done again."""
    recipe, args = reading.recipe, reading.args
    assert args.output_dir is not None
    folder = RunFolder(args.output_dir)
    folder.claim(_options(reading), is_main=args.process_index == 0)
    rows = read_rows(recipe, voice)
    prepared = prepare(recipe, args, folder, rows, voice)
    trainer = student_trainer(recipe, args, prepared)
    use_progress(trainer, "training", voice)
    if not folder.trained:
        _train(trainer, folder, voice)
    return _results(recipe, args, folder, prepared, trainer, voice)


def _train(trainer: DistillationTrainer, folder: RunFolder, voice: Voice) -> None:
    checkpoint = folder.newest_checkpoint()
    if checkpoint is not None:
        voice("training", f"goes on from {Path(checkpoint).name}")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if trainer.args.should_save:
        trainer.save_state()
        folder.finish()


def _results(
    recipe: Recipe, args: SemCKDConfig, folder: RunFolder, prepared: Prepared, trainer: Any, voice: Voice
) -> Outcome:
    """Evaluate the student and write files; what fails here costs only itself, the student is saved."""
    problems: list[str] = []
    found: Evaluation | None = None
    files: tuple[str, ...] = ()
    if args.process_index == 0:
        voice.text("")
        try:
            found = _evaluate(recipe, prepared, trainer)
            found.save(folder.path)
            voice.text(f"{found}\n")
            if recipe.results.onnx:
                batch = prepared.samples.collator([prepared.samples.splits.test[n] for n in range(2)])
                files = tuple(map(str, export_onnx(trainer.student, folder.path / ONNX, batch, int8=True)))
        except (SemCKDError, OSError) as error:
            problems.append(str(error))
            logger.error("The student is saved, but not all results: %s", error)
    return Outcome(
        student=str(folder.path),
        auto_class=f"AutoModelFor{prepared.rows.kind.heads[0]}",
        evaluation=found,
        report=None,
        onnx=files,
        problems=tuple(problems),
    )


def _evaluate(recipe: Recipe, prepared: Prepared, trainer: Any) -> Evaluation:
    teachers = prepared.teachers
    names = ["teacher"] if len(teachers) == 1 else [f"teacher {place + 1}" for place in range(len(teachers))]
    models = {**dict(zip(names, teachers, strict=True)), "student": trainer.student}
    for model in models.values():
        model.to("cpu")
    return evaluate(
        models,
        prepared.samples.splits.test,
        data_collator=prepared.samples.collator,
        metric=recipe.results.metric,
        onnx=recipe.results.onnx,
        batch_size=trainer.args.per_device_eval_batch_size,
    )


def _options(reading: Reading) -> Mapping[str, Any]:
    """Return the options that were given, by name."""
    recipe, args = reading.recipe, reading.args
    known = {**vars(recipe.models), **vars(recipe.data), **vars(recipe.results), **vars(args)}
    return {name: known[name] for name in reading.given if name in known}
