"""The report of a training, from what its trainer knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import InputError
from ..evaluation.examples import compare_predictions
from ..evaluation.table import Evaluation
from ..publishing.facts import BOOKKEEPING, StudentFacts, environment, last_evaluation
from ..publishing.report.history import Rows, association_history, layer_errors, loss_curves
from ..publishing.report.parts import Comparison, DeployTable, Run, UsedSetting
from ..publishing.report.report import DistillationReport
from ..publishing.usage import loading_code
from .checkpoint import SETTINGS_FILE

EVALUATE = 'evaluation=evaluate({"teacher": teacher, "student": trainer.student}, data)'
NO_WINDOW = "No window was logged: set logging_steps well below the number of optimizer steps."
MISSING = {
    "deploy": f"Not measured yet: call trainer.distillation_report({EVALUATE}), or write evaluation.json into the "
    "folder of the training with hf-semckd evaluate --output, and run hf-semckd report again.",
    "losses": NO_WINDOW,
    "association": "There is none: this feature loss has no association.",
    "comparison": "Needs the models: call trainer.distillation_report(dataset=data) after training.",
    "settings": f"The settings were not found: they are in {SETTINGS_FILE} beside a saved student.",
    "usage": "The student was not found: call trainer.save_model().",
}


def assemble_report(
    run: Run,
    rows: Rows,
    layers: Mapping[str, Sequence[str]],
    *,
    deploy: DeployTable | None = None,
    comparison: Comparison | None = None,
    why: Mapping[str, str] | None = None,
) -> DistillationReport:
    """Return the report of a training whose log has these `rows`.

    `layers` are the names by "student_layers" and "teacher_layers", `why` the known reasons for missing parts.
    """
    students, teachers = layers.get("student_layers", ()), layers.get("teacher_layers", ())
    found: dict[str, Any] = {
        "deploy": deploy,
        "losses": loss_curves(rows),
        "association": association_history(rows, students, teachers),
        "comparison": comparison,
    }
    there = {**found, "settings": run.settings, "usage": run.usage}
    texts_of = MISSING if any("loss" in row for row in rows) else {**MISSING, "association": NO_WINDOW}
    missing = {name: text for name, text in {**texts_of, **(why or {})}.items() if not there[name]}
    return DistillationReport(run, **found, layer_errors=layer_errors(rows, students), missing=missing)


def trained_run(
    facts: StudentFacts, training: Mapping[str, Any], rows: Rows, settings: tuple[UsedSetting, ...], student: str
) -> Run:
    """Return what is told of a run; `training` are its `RECORDED_ARGUMENTS`, `student` is its class."""
    teachers = [facts.teacher] if isinstance(facts.teacher, str) else list(facts.teacher or ["a teacher"])
    counts = {"parameters of the student": f"{facts.parameters:,}"}
    if facts.teacher_parameters:
        counts["parameters of the teacher"] = f"{facts.teacher_parameters:,}"
    code = loading_code(facts.repo_name, facts.student_class, facts.processor)
    all_told = {**counts, **told(training, rows)}
    return Run(facts.method, student, " and ".join(teachers), settings, all_told, texts(environment()), code)


def check_trained(distills: bool, rows: Rows) -> None:
    """Raise `InputError` where there is nothing to report."""
    if distills and any("loss" in row or "train_loss" in row for row in rows):
        return
    raise InputError(
        "There is no distillation to report",
        received="a trainer that has not trained yet" if distills else "a trainer without distillation",
        expected="a trainer whose train() has run",
        todo="call trainer.train() first; of an earlier training, run `hf-semckd report` on its output_dir",
    )


def compare_or_say_why(
    student: nn.Module, teachers: Callable[[], Sequence[nn.Module]], dataset: Any, *, sharded: bool, **options: Any
) -> tuple[Comparison | None, dict[str, str]]:
    """Return `compare_predictions` on a data set (the first of several), or why there is none, by the part's name."""
    if isinstance(dataset, Mapping) and dataset:
        dataset = next(iter(dataset.values()))
    if sharded:
        return None, {"comparison": "Not compared: the models are sharded over processes. Load the saved ones for it."}
    if dataset is None:
        return None, {"comparison": "There was no eval_dataset: call trainer.distillation_report(dataset=data)."}
    try:
        return compare_predictions(student, teachers(), dataset, **options), {}
    except InputError as error:
        return None, {"comparison": f"Student and teacher were not compared. {error}"}


def deploy_table(evaluation: Evaluation | None) -> DeployTable | None:
    """Return the table of an evaluation, as a report holds it."""
    if evaluation is None:
        return None
    if not isinstance(evaluation, Evaluation):
        raise InputError(
            "This is no evaluation",
            received=f"evaluation of type {type(evaluation).__name__}",
            expected="what hf_semckd.evaluate returned",
            todo=f"pass {EVALUATE}",
        )
    return DeployTable(
        evaluation.rows, evaluation.metric, evaluation.higher_is_better, evaluation.samples, evaluation.notes
    )


def told(training: Mapping[str, Any], rows: Rows) -> dict[str, str]:
    """Return what a report tells of a training: its arguments, and the results of the last evaluation."""
    measured = last_evaluation(rows).items()
    results = {name: f"{value:.4g}" for name, value in measured if name.removeprefix("eval_") not in BOOKKEEPING}
    return {**texts(training), **results}


def texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Return what is known of values, as texts."""
    return {str(name): str(value) for name, value in values.items() if value is not None}
