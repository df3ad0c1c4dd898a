"""A row of the deploy table: a model as it was run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """The share of a reference's quality that is kept, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Latency:
    """The time of a forward pass over some samples: its median and 95th percentile, in milliseconds."""

    samples: int
    p50: float
    p95: float

    @property
    def throughput(self) -> float:
        """Samples a second, by the median."""
        return 1000 * self.samples / self.p50


@dataclass(frozen=True)
class Row:
    """A model as it was run.

    Attributes:
        kept: Share of the reference's quality.
        agreement: Share of positions decided as by the reference; of numbers, their correlation.
        calibration_error: From 0 to 1; None in regression.
        disk_bytes: Of the saved model; None for a module without `save_pretrained`.
        peak_bytes: Of a process that runs the largest measured batch, or of the GPU; None where not measured.
    """

    model: str
    runtime: str
    device: str
    quality: float
    kept: Share
    agreement: float
    calibration_error: float | None
    parameters: int
    disk_bytes: int | None
    peak_bytes: int | None
    latency: tuple[Latency, ...]
