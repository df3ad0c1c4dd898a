"""The report of a distillation: what was learned, what it is worth and how it is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from ...files import write_atomic, write_json
from .page import render_page
from .parts import AssociationHistory, Comparison, Curve, DeployTable, LayerError, Run
from .reading import load_json, read
from .words import association_words, comparison_words, error_words, headline

PAGE, DATA = "report.html", "report.json"


@dataclass(frozen=True)
class DistillationReport:
    """What a training learned and what its student is worth; printed, it is a short text.

    Attributes:
        run: Who taught whom, with which settings and why.
        deploy: What `evaluate` measured.
        losses: The total loss and its terms, in training and in evaluation.
        association: Over time; None where there is none.
        layer_errors: The feature error of each student layer, at the start and at the end.
        comparison: Student and teacher on the same samples.
        missing: Why a part is missing, and how to get it, by the part's name.
    """

    run: Run
    deploy: DeployTable | None = None
    losses: tuple[Curve, ...] = ()
    association: AssociationHistory | None = None
    layer_errors: tuple[LayerError, ...] = ()
    comparison: Comparison | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DistillationReport:
        """Read `report.json`; `InputError` where it holds something else."""
        return read(cls, load_json(Path(path)), "report")

    def with_deploy(self, deploy: DeployTable) -> DistillationReport:
        """Return the report with a deploy table."""
        missing = {name: why for name, why in self.missing.items() if name != "deploy"}
        return replace(self, deploy=deploy, missing=missing)

    def page(self) -> str:
        """Return the page, HTML that needs nothing else."""
        return render_page(**{entry.name: getattr(self, entry.name) for entry in fields(self)})

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `report.html` and its data `report.json`, and return the path of the page."""
        target = Path(folder)
        write_json(target / DATA, self)
        return write_atomic(target / PAGE, self.page().encode("utf-8", "replace"))

    def __str__(self) -> str:
        said = [f"{self.run.method}: {self.run.student}, taught by {self.run.teacher}"]
        said += filter(None, [headline(self.deploy)])
        said += [] if self.association is None else association_words(self.association)
        said += [] if self.comparison is None else [comparison_words(self.comparison)]
        said += filter(None, [error_words(self.layer_errors)])
        return "\n".join([*said, *(f"Missing, {name}: {why}" for name, why in self.missing.items())])
