"""The HTML page of a report: everything in one file, no script, and nothing is loaded from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from ..rows import Row
from . import words
from .charts import Chart, error_spans, heat_maps, line_chart, reliability_chart
from .parts import AssociationHistory, Curve, DeployTable

TERMS = {
    "loss": "Total loss",
    "task_loss": "Task loss",
    "logit_loss": "Logit distillation",
    "feature_loss": "Feature distillation",
}
EVALUATION = "eval_loss"


@dataclass(frozen=True)
class Tile:
    """A large number, and what it is."""

    number: str
    label: str


def render_page(**parts: object) -> str:
    """Return the page of a report's parts, by the names of the fields of `DistillationReport`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    functions = [tiles, deploy_rows, loss_charts, entropy_chart, heat_maps, error_spans, reliability_chart]
    environment.globals.update({function.__name__: function for function in functions}, words=words)
    environment.filters["percent"] = lambda value: "-" if value is None else f"{value:.1%}"
    return environment.get_template("report.html.jinja").render(**parts)


def tiles(deploy: DeployTable | None) -> list[Tile]:
    """Return the numbers that decide: quality kept, parameters, speed and agreement."""
    pair = None if deploy is None else words.deploy_pair(deploy)
    if deploy is None or pair is None:
        return []
    teacher, student = pair
    latency = student.latency[0]
    found = [
        Tile(f"{student.parameters / teacher.parameters:.2g}×", "the parameters"),
        Tile(f"{teacher.latency[0].p50 / latency.p50:.2g}×", f"the speed, batch of {latency.samples}"),
    ]
    if math.isfinite(student.agreement):
        found.append(Tile(f"{student.agreement:.1%}", "agreement with the teacher"))
    if math.isfinite(student.kept.value):
        found.insert(0, Tile(f"{student.kept.value:.1%}", f"of the teacher's {deploy.metric} kept"))
    return found


def deploy_rows(deploy: DeployTable) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the deploy table, as text."""
    counts = [latency.samples for latency in deploy.rows[0].latency]
    head = ["model", "run by", deploy.metric, "kept (95%)", "agrees", "calibration error", "parameters", "disk"]
    head += ["peak memory", *(f"ms, batch of {count}" for count in counts)]
    return head, [_deploy_row(row, deploy.rows[0]) for row in deploy.rows]


def _deploy_row(row: Row, reference: Row) -> list[str]:
    kept, text = row.kept, "reference" if row is reference else "-"
    if row is not reference and math.isfinite(kept.value):
        text = f"{kept.value:.1%} ({kept.low:.1%} - {kept.high:.1%})"
    return [
        row.model,
        row.runtime if row.device == "cpu" else f"{row.runtime}, GPU",
        f"{row.quality:.4g}",
        text,
        f"{row.agreement:.1%}" if math.isfinite(row.agreement) else "-",
        "-" if row.calibration_error is None else f"{row.calibration_error:.3f}",
        f"{row.parameters:,}",
        _megabytes(row.disk_bytes),
        _megabytes(row.peak_bytes),
        *(f"{latency.p50:.2f} (p95 {latency.p95:.2f})" for latency in row.latency),
    ]


def loss_charts(curves: Sequence[Curve]) -> list[Chart]:
    """Return a chart for the loss and each of its terms; the evaluation's is the task loss."""
    named = {curve.name: curve for curve in curves}
    beside = "loss" if "loss" in named and "task_loss" not in named else "task_loss"
    charts = []
    for name, title in TERMS.items():
        lines = [("training", "train", named[name])] if name in named else []
        if name == beside and EVALUATION in named:
            lines.append(("evaluation", "eval", named[EVALUATION]))
        if lines:
            charts.append(line_chart(title, lines))
    return charts


def entropy_chart(association: AssociationHistory) -> Chart | None:
    """Return the entropy over time, between that of one layer and the uniform one; None where it was not logged."""
    if association.entropy is None:
        return None
    span = words.entropy_range(association)
    levels = [(span.uniform, f"uniform, {span.uniform:.3g}")]
    curves = [("mean entropy (nats)", "train", association.entropy)]
    return line_chart(
        "Entropy of the association",
        curves,
        low=span.single,
        high=span.single + 1.08 * (span.uniform - span.single),
        levels=levels,
    )


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.1f} MB"
