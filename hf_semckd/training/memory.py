"""What a training takes of memory, told before it starts: weights counted, and a small step measured."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.views import preserved_random_state
from ..errors import SemCKDError
from ..losses import FeatureLoss
from ..models.inputs import FAILURES, evaluating
from ..models.tables import aligned_lines
from ..teacher.placement import is_spread
from .allocations import SAMPLES, StepMemory, copied_buffers, measure_step, put_back_buffers, repeated, stored_bytes

logger = logging.getLogger(__name__)
# Of the state that an optimizer keeps of a number, where it does not tell: two moments in float32, as Adam's.
USUAL_STATE = 8.0
# Of which a matrix of so many rows and columns tells how much it is.
TRIAL_SIZE = 64
PLACES = {"meta": "offloaded or not loaded, and not counted"}
UNITS = ((2**30, "GB"), (2**20, "MB"), (2**10, "KB"))


@dataclass(frozen=True)
class TrainedBytes:
    """Bytes of what is trained: its weights and buffers, their gradients, and what the optimizer keeps of them."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.gradients + self.optimizer

    @classmethod
    def of(cls, module: nn.Module, without: nn.Module | None = None, optimizer: Any = None) -> TrainedBytes:
        """Count a module, but for a part of it; without an optimizer, Adam's moments in the weights' precision."""
        left_out = set() if without is None else {id(entry) for entry in (*without.parameters(), *without.buffers())}
        weights = [entry for entry in module.parameters() if id(entry) not in left_out]
        buffers = [entry for entry in module.buffers() if id(entry) not in left_out]
        trained = [entry for entry in weights if entry.requires_grad]
        shares = {dtype: _state_share(optimizer, dtype) for dtype in {entry.dtype for entry in trained}}
        return cls(
            sum(map(stored_bytes, [*weights, *buffers])),
            sum(map(stored_bytes, trained)),
            round(sum(stored_bytes(entry) * shares[entry.dtype] for entry in trained)),
        )


@dataclass(frozen=True)
class CacheBytes:
    """Bytes on disk of a sample's teacher outputs, and of all samples; None where their number is not known."""

    per_sample: float
    total: int | None


@dataclass(frozen=True)
class MemoryEstimate:
    """About what a training takes, in bytes.

    Attributes:
        projections: What the feature loss trains; None without a feature loss.
        teacher: Weights by the device that they are on; those on `meta` are loaded or moved when they are needed.
        step: What a step takes besides; None where it could not be measured.
        batch_size: Samples of a micro-batch on one device.
        accumulates: Whether a step has several micro-batches.
        cache: On disk; None without one.
        unmeasured: Why there is no `step`.
    """

    student: TrainedBytes
    projections: TrainedBytes | None
    teacher: Mapping[str, int]
    step: StepMemory | None
    batch_size: int
    accumulates: bool
    cache: CacheBytes | None = None
    unmeasured: str = ""

    @property
    def activations(self) -> int | None:
        """What is held at most besides weights, gradients and optimizer: activations, features, logits, losses."""
        if self.step is None:
            return None
        return max(self.step.peak(self.batch_size, accumulated=self.accumulates) - self.step.gradients, 0)

    @property
    def total(self) -> int:
        """The sum of all but the cache and weights that are nowhere yet."""
        here = sum(size for device, size in self.teacher.items() if device != "meta")
        trained = self.student.total + (0 if self.projections is None else self.projections.total)
        return trained + here + (self.activations or 0)

    def rows(self) -> list[tuple[str, str, str]]:
        """Return part, size and what is in it; the total last."""
        rows = [("student", readable(self.student.total), _shares(self.student))]
        if self.projections is not None:
            rows.append(("projections", readable(self.projections.total), _shares(self.projections)))
        places = [f"{readable(size)} {PLACES.get(place, f'on {place}')}" for place, size in self.teacher.items()]
        rows.append(("teacher", readable(sum(self.teacher.values())), ", ".join(places)))
        held = "not measured" if self.activations is None else readable(self.activations)
        samples = f"{self.batch_size} samples at a time, logits and features among them"
        rows.append(("activations", held, f"{self.unmeasured}; {samples}" if self.unmeasured else samples))
        rows.append(("together", f"about {readable(self.total)}", "" if self.step else "and activations"))
        if self.cache is not None:
            total = "" if self.cache.total is None else f", {readable(self.cache.total)} for all"
            rows.append(("cache", f"{readable(self.cache.per_sample)} a sample{total}", "on disk"))
        return rows

    def __str__(self) -> str:
        """Return all of it in one line."""
        return "; ".join(f"{part} {size}" + (f" ({what})" if what else "") for part, size, what in self.rows())

    def lines(self) -> list[str]:
        """Return a table."""
        return aligned_lines(self.rows(), "  ")

    @property
    def summary(self) -> dict[str, Any]:
        """All of this, with the sums, for JSON."""
        return {**asdict(self), "activations": self.activations, "total": self.total}


def teacher_bytes(models: Sequence[nn.Module]) -> dict[str, int]:
    """Return the bytes of teachers' weights and buffers by device, as they are stored there; see `stored_bytes`."""
    found: dict[str, int] = {}
    for entry in {id(entry): entry for model in models for entry in (*model.parameters(), *model.buffers())}.values():
        found[str(entry.device)] = found.get(str(entry.device), 0) + stored_bytes(entry)
    return found


def try_step(
    student: nn.Module,
    others: Sequence[nn.Module],
    batch: Mapping[str, Any],
    loss_of: Callable[[Mapping[str, Any]], Tensor],
    seed: int,
) -> StepMemory | None:
    """Measure a step on a few samples, which changes nothing; None where it cannot run, or the student is sharded.

    Args:
        student: What is trained, the feature loss included.
        others: The teachers.
        batch: A few samples; they are taken several times over.
        loss_of: Runs both models on a batch.
        seed: Of the random numbers; those of the training stay as they are.
    """
    if is_spread(student):
        return None
    trained = [entry for entry in student.parameters() if entry.requires_grad]
    known = [entry for model in (student, *others) for entry in (*model.parameters(), *model.buffers())]
    samples = {size: repeated(batch, size) for size in SAMPLES}
    known += [value for made in samples.values() for value in made.values() if isinstance(value, Tensor)]
    before = copied_buffers(student)
    try:
        with preserved_random_state(seed), evaluating(student), torch.enable_grad():
            student.train()
            return measure_step(lambda size: loss_of(samples[size]), known, trained)
    except (SemCKDError, KeyError, *FAILURES) as error:
        logger.debug("The memory of a step was not measured: %s", error)
        return None
    finally:
        put_back_buffers(student, before)


def feature_loss_bytes(loss: FeatureLoss | None, optimizer: Any = None) -> TrainedBytes | None:
    """Return the bytes of what a feature loss trains; None without one."""
    return None if loss is None else TrainedBytes.of(loss, optimizer=optimizer)


def readable(size: float) -> str:
    """Return a number of bytes for people."""
    for unit, name in UNITS:
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"


def _shares(trained: TrainedBytes) -> str:
    parts = ("weights", trained.weights), ("gradients", trained.gradients), ("optimizer", trained.optimizer)
    return ", ".join(f"{name} {readable(size)}" for name, size in parts)


def _state_share(optimizer: Any, dtype: torch.dtype) -> float:
    """Return what an optimizer keeps of a parameter, as a share of it: another of its kind takes a step of a trial."""
    width = torch.empty((), dtype=dtype).element_size()
    if optimizer is None:
        return 2.0
    inner = getattr(optimizer, "optimizer", optimizer)
    trial = nn.Parameter(torch.zeros(TRIAL_SIZE, TRIAL_SIZE, dtype=dtype))
    trial.grad = torch.zeros_like(trial)
    try:
        # torch's AdamW keeps settings that are not its arguments.
        taken = inspect.signature(type(inner)).parameters
        made = type(inner)([trial], **{name: value for name, value in inner.defaults.items() if name in taken})
        made.step()
        kept = [value for value in made.state[trial].values() if isinstance(value, Tensor) and value.dim()]
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, AssertionError) as error:
        logger.debug("The optimizer's state was not measured: %s", error)
        return USUAL_STATE / width
    return sum(map(stored_bytes, kept)) / stored_bytes(trial)
