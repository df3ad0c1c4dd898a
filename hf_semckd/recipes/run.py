"""Runs a recipe: trains the student, evaluates it, and writes all that is told of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from ..evaluation.evaluate import evaluate
from ..evaluation.export import export_onnx
from ..evaluation.table import Evaluation
from ..publishing.card import EVALUATION_FILE
from ..publishing.folder import CARD
from ..publishing.report.report import PAGE
from ..training.checks import check_feature_loss
from .check import check_metric, check_teacher
from .folder import ONNX, RunFolder
from .prepare import prepare, whole_student, whole_teachers
from .progress import Voice, use_progress
from .reading import Reading
from .rows import read_rows
from .schema import Recipe
from .training import Prepared, student_trainer

logger = logging.getLogger(__name__)
TABLE = "evaluation.txt"


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: the student's folder, the deploy table, the report's address, ONNX files, and what failed."""

    student: str
    auto_class: str
    evaluation: Any
    report: str | None
    onnx: tuple[str, ...]
    problems: tuple[str, ...] = ()


def run_recipe(reading: Reading, voice: Voice) -> Outcome:
    """Do what a recipe says. What an earlier run of it has done already is not done again."""
    recipe, args = reading.recipe, reading.args
    assert args.output_dir is not None
    folder = RunFolder(args.output_dir)
    # The others would find a file that is being written, which no recipe made.
    with args.main_process_first(desc="claiming the folder"):
        folder.claim(reading.options, is_main=args.process_index == 0)
    check_feature_loss(recipe.models.method)
    rows = read_rows(recipe, voice)
    check_metric(recipe.results.metric, rows)
    if folder.trained:
        folder.check_weights()
    if folder.trained and not args.push_to_hub and _is_told(folder, recipe):
        return _told_before(folder, rows.kind.heads[0], voice)
    prepared = prepare(recipe, args, folder, rows, voice)
    if not folder.trained and args.process_index == 0:
        check_teacher(prepared, args.per_device_eval_batch_size, voice)
    trainer = student_trainer(recipe, args, prepared)
    use_progress(trainer, "training", voice)
    if folder.trained:
        trainer.state = folder.state()
    else:
        _train(trainer, folder, voice)
    return _Results(recipe, folder, prepared, trainer, voice).tell()


def _train(trainer: Any, folder: RunFolder, voice: Voice) -> None:
    checkpoint = folder.newest_checkpoint()
    if checkpoint is not None:
        voice("training", f"goes on from {Path(checkpoint).name}")
    trainer.train(resume_from_checkpoint=checkpoint)
    # Not yet to the Hub: the card is to have the table.
    trainer.save_model(trainer.args.output_dir, _internal_call=True)
    if trainer.args.should_save:
        trainer.save_state()
        folder.finish()


class _Results:
    """Evaluates the student and writes files; what fails here costs only itself, the student is saved."""

    def __init__(self, recipe: Recipe, folder: RunFolder, prepared: Prepared, trainer: Any, voice: Voice):
        self.recipe, self.folder, self.prepared, self.trainer, self.voice = recipe, folder, prepared, trainer, voice
        self.problems: list[str] = []

    def tell(self) -> Outcome:
        """Write and push what there is to tell, and return it with what failed."""
        found, report, files = None, None, ()
        if self.trainer.is_world_process_zero():
            self.voice.text("")
            found = self._try("table", self._evaluate)
            report = self._try("report", lambda: self._report(found))
            files = self._try("ONNX files", self._export) if self.recipe.results.onnx else ()
            self._try("card", lambda: self.trainer.create_model_card(evaluation=found))
            if not self.problems:
                self.folder.tell(_told_by(self.recipe))
        if self.trainer.args.push_to_hub:
            pushed = self._try("push", lambda: self.trainer.push_to_hub(evaluation=found))
            if pushed is not None:
                self.voice("hub", str(pushed.repo_url))
        head = self.prepared.rows.kind.heads[0]
        return Outcome(str(self.folder.path), f"AutoModelFor{head}", found, report, files or (), tuple(self.problems))

    def _try(self, what: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except Exception as error:  # whatever it is: hours of training are done, and what follows can still work
            self.problems.append(f"{what}: {error}")
            shown = logger.isEnabledFor(logging.DEBUG)
            logger.error("The student is saved, but the %s failed. %s", what, error, exc_info=shown)
            return None

    @cached_property
    def _student(self) -> nn.Module:
        kind = self.prepared.rows.kind
        return whole_student(self.trainer.args, self.folder, kind, self.trainer.student)

    def _evaluate(self) -> Evaluation:
        args, kind = self.trainer.args, self.prepared.rows.kind
        teachers = whole_teachers(self.recipe, args, self.folder, kind, self.prepared.teachers)
        names = ["teacher"] if len(teachers) == 1 else [f"teacher {place + 1}" for place in range(len(teachers))]
        models = {**dict(zip(names, teachers, strict=True)), "student": self._student}
        for model in models.values():
            model.to("cpu")
        found = evaluate(
            models,
            self.prepared.samples.splits.test,
            data_collator=self.prepared.samples.collator,
            metric=self.recipe.results.metric,
            onnx=self.recipe.results.onnx,
            batch_size=args.per_device_eval_batch_size,
        )
        found.save(self.folder.path)
        self.voice.text(f"{found.text(self.voice.width)}\n")
        return found

    def _report(self, found: Evaluation | None) -> str:
        report = self.trainer.distillation_report(evaluation=found, dataset=self.prepared.samples.splits.test)
        return report.save(self.folder.path).absolute().as_uri()

    def _export(self) -> tuple[str, ...]:
        samples = self.prepared.samples
        batch = samples.collator([samples.splits.test[place % len(samples.splits.test)] for place in range(2)])
        return tuple(map(str, export_onnx(self._student, self.folder.path / ONNX, batch, int8=True)))


def _is_told(folder: RunFolder, recipe: Recipe) -> bool:
    """Whether an earlier run has written everything, by the metric that is wanted now."""
    files = [EVALUATION_FILE, TABLE, PAGE, CARD, *([f"{ONNX}/model_int8.onnx"] if recipe.results.onnx else [])]
    if not all((folder.path / name).is_file() for name in files):
        return False
    return folder.is_told(_told_by(recipe))


def _told_by(recipe: Recipe) -> dict[str, Any]:
    return {"metric": recipe.results.metric, "max_eval_samples": recipe.data.max_eval_samples}


def _table(folder: RunFolder) -> Any:
    return json.loads((folder.path / EVALUATION_FILE).read_text(encoding="utf-8"))


def _told_before(folder: RunFolder, head: str, voice: Voice) -> Outcome:
    voice.text(f"\nAn earlier run has done all of this.\n\n{(folder.path / TABLE).read_text(encoding='utf-8')}")
    return Outcome(
        student=str(folder.path),
        auto_class=f"AutoModelFor{head}",
        evaluation=_table(folder),
        report=(folder.path / PAGE).absolute().as_uri(),
        onnx=tuple(map(str, sorted((folder.path / ONNX).glob("*.onnx")))),
    )
