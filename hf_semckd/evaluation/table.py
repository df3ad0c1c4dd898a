"""The deploy table: a row for each model and way to run it, as text, JSON and a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from ..errors import MissingDependencyError
from ..files import write_atomic, write_json
from ..models.tables import aligned_lines
from ..publishing.rows import Row
from .picture import save_picture, way_of


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; printed, it is a table. The first row is the reference.

    Attributes:
        metric, higher_is_better: Name of the quality, and its direction.
        samples: Number of evaluated samples.
        shapes: Inputs of the last model for which times were measured, by number of samples.
        machine: Versions, processor, threads.
        notes: What could not be measured.
    """

    rows: tuple[Row, ...]
    metric: str
    higher_is_better: bool
    samples: int
    shapes: Mapping[int, Mapping[str, tuple[int, ...]]]
    machine: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def row(self, model: str, runtime: str = "PyTorch", device: str = "cpu") -> Row:
        """Return the row of a model; `KeyError` if it was not measured so."""
        for row in self.rows:
            if (row.model, row.runtime, row.device) == (model, runtime, device):
                return row
        raise KeyError(f"{model!r} was not measured with {runtime} on {device}")

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int | None = None) -> str:
        """Return the table and where it was measured; wider than `width` characters, models are its columns."""
        counts = [latency.samples for latency in self.rows[0].latency]
        head = ["model", "run by", self.metric, "kept (95%)", "agrees", "calibration", "parameters", "disk"]
        head += ["memory", *(f"ms for {count}" for count in counts), "samples/s"]
        cells = [head, *(_cells(row, row is self.rows[0]) for row in self.rows)]
        lines = aligned_lines(cells)
        if width is not None and max(map(len, lines)) > width:
            lines = aligned_lines(list(zip(*cells, strict=True)))
        machine = self.machine
        where = f"{machine['processor']}, {machine['torch_threads']} thread{'s' * (machine['torch_threads'] > 1)}"
        if machine["accelerator"] is not None:
            where += f", {machine['accelerator']}"
        lines += ["", f"{self.samples} samples; ms: median / 95th percentile; {where}", *self.notes]
        return "\n".join(lines)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `evaluation.json`, `evaluation.txt` and, with matplotlib, `evaluation.png`; return the folder."""
        target = Path(folder)
        write_json(target / "evaluation.json", self)
        write_atomic(target / "evaluation.txt", f"{self}\n".encode())
        with suppress(MissingDependencyError):
            save_picture(self.rows, self.metric, target / "evaluation.png", higher_is_better=self.higher_is_better)
        return target


def _cells(row: Row, is_reference: bool) -> list[str]:
    kept = f"{row.kept.value:.1%}  {row.kept.low:.1%} - {row.kept.high:.1%}" if isfinite(row.kept.value) else "-"
    kept = "reference" if is_reference else kept
    error = "-" if row.calibration_error is None else f"{row.calibration_error:.3f}"
    cells = [row.model, way_of(row), f"{row.quality:.4g}", kept]
    cells += [f"{row.agreement:.1%}", error, f"{row.parameters:,}", _megabytes(row.disk_bytes)]
    cells += [_megabytes(row.peak_bytes), *(f"{entry.p50:.2f} / {entry.p95:.2f}" for entry in row.latency)]
    return [*cells, f"{max(entry.throughput for entry in row.latency):,.0f}"]


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.1f} MB"
