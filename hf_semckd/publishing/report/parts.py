"""The parts of a report: plain data, each checked when it is made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import InputError
from ..plots import ROUNDING
from ..rows import Row

PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+=*")


@dataclass(frozen=True)
class DeployTable:
    """The rows of an `Evaluation`, the first of which is the reference; all with the same batches for latency."""

    rows: tuple[Row, ...]
    metric: str
    higher_is_better: bool
    samples: int
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        batches = {tuple(entry.samples for entry in row.latency) for row in self.rows}
        times = [time for row in self.rows for entry in row.latency for time in (entry.p50, entry.p95)]
        counts = [row.parameters for row in self.rows]
        if len(batches) != 1 or not all(batches) or not min([*times, *counts]) > 0:
            raise _invalid("deploy table", "at least one row, equal batches, and times and parameters above 0")


@dataclass(frozen=True)
class Curve:
    """A logged number over optimizer steps."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values) or not self.steps or not all(map(math.isfinite, self.values)):
            raise _invalid(f"curve of {self.name!r}", "a finite value for each step, one at least")


@dataclass(frozen=True)
class AssociationMap:
    """Mean association weights [student layer][teacher layer] from an optimizer step to another one."""

    first: int
    last: int
    weights: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class AssociationHistory:
    """The association over training: maps in the order of time, and its mean entropy in nats.

    Layers of several teachers begin with `teachers.0.` and the like.
    """

    student_layers: tuple[str, ...]
    teacher_layers: tuple[str, ...]
    maps: tuple[AssociationMap, ...]
    entropy: Curve | None = None

    def __post_init__(self) -> None:
        shape = (len(self.student_layers), len(self.teacher_layers))
        for entry in self.maps:
            weights = [weight for row in entry.weights for weight in row]
            shapes = {(len(entry.weights), len(row)) for row in entry.weights}
            if shapes != {shape} or not all(-ROUNDING <= weight <= 1 + ROUNDING for weight in weights):
                raise _invalid("association", f"weights in [0, 1] of {shape[0]} x {shape[1]} layers")
        if not self.maps or not all(shape):
            raise _invalid("association", "at least one map, and one layer of each model")


@dataclass(frozen=True)
class LayerError:
    """The association-weighted feature error of a student layer in the first and in the last logging window."""

    layer: str
    first: float
    last: float


@dataclass(frozen=True)
class Bin:
    """Decisions of similar confidence: their number, mean confidence, and the share of them that is right."""

    count: int
    confidence: float
    right: float


@dataclass(frozen=True)
class Reliability:
    """The calibration of a model: its expected error, and the bins that it is a mean over."""

    model: str
    error: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Example:
    """A sample on which student and teacher differ: what it shows, its label, and what both predict.

    Attributes:
        picture: A PNG as a data URI.
    """

    index: int
    difference: float
    student: str
    teacher: str
    label: str | None = None
    student_confidence: float | None = None
    teacher_confidence: float | None = None
    text: str | None = None
    picture: str | None = None

    def __post_init__(self) -> None:
        if self.picture is not None and not PICTURE.fullmatch(self.picture):
            raise _invalid("picture of an example", "a PNG as a data URI")


@dataclass(frozen=True)
class Comparison:
    """Student and teacher on the same labeled samples.

    Attributes:
        quality: By role ("student", "teacher"), in the `metric`.
        agreement: Share of positions of which both decide the same; of numbers, their correlation.
        measure: What the difference of an example is.
        examples: Those that differ most, in falling order.
    """

    samples: int
    metric: str
    quality: Mapping[str, float]
    agreement: float
    measure: str
    reliability: tuple[Reliability, ...] = ()
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class UsedSetting:
    """A setting, its value as text, and why it has that value."""

    name: str
    value: str
    why: str


@dataclass(frozen=True)
class Run:
    """Who taught whom, and how.

    Attributes:
        facts: What is told of the training and its results, by name.
        environment: Versions and hardware.
        usage: Python that loads the student.
    """

    method: str
    student: str
    teacher: str
    settings: tuple[UsedSetting, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    usage: str = ""


def names_or_numbers(names: Sequence[str], count: int) -> tuple[str, ...]:
    """Return the names of so many layers, or their numbers from 1 where they are not known."""
    return tuple(names) if len(names) == count else tuple(str(index + 1) for index in range(count))


def _invalid(name: str, expected: str) -> InputError:
    return InputError(
        f"The {name} of a report is invalid",
        received="other values",
        expected=expected,
        todo="write the report again with the version of hf_semckd that reads it",
    )
