"""What runs any teacher, or several, beside a student that trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..features.targets import TeacherTargets
from ..losses import FeatureLoss
from ..losses.ensemble import EnsembleLoss
from ..losses.logits import LogitMixture
from ..models.language_head import LanguageHead
from .cached import CachedTeacher
from .outputs import TeacherOutputs, check_finite
from .teacher import Teacher


def teacher_prefix(number: int) -> str:
    """Return what the layers of one of several teachers begin with."""
    return f"teachers.{number}."


@dataclass(frozen=True, eq=False)
class TeacherEnsemble:
    """Several teachers that run in turn, each on the inputs that it takes; `mixture` joins their logits."""

    teachers: Sequence[Teacher | CachedTeacher]
    mixture: LogitMixture

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The CUDA stream that all of them run on; None where one of them cannot have a stream of its own."""
        streams = [teacher.stream for teacher in self.teachers]
        return None if any(stream is None for stream in streams) else streams[0]

    def losses(self, loss: FeatureLoss | None) -> list[FeatureLoss | None]:
        """Return the feature loss of each teacher."""
        return [None] * len(self.teachers) if not isinstance(loss, EnsembleLoss) else [*loss.members]

    def run(
        self, batch: Mapping[str, Any], *, logits: bool, features: bool, loss: FeatureLoss | None = None
    ) -> TeacherOutputs:
        """Return the joined logits, and a part of features per teacher; see `Teacher.run`."""
        members = zip(self.teachers, self.losses(loss), strict=True)
        outputs = [teacher.run(batch, logits=logits, features=features, loss=own) for teacher, own in members]
        given = [entry.logits for entry in outputs if entry.logits is not None]
        kept = TeacherTargets(parts=tuple(entry.features for entry in outputs))
        return TeacherOutputs(self.mixture(given, batch) if logits else None, kept, outputs[0].mask)


@dataclass(eq=False)
class TeacherRunner:
    """Runs a teacher, or several, on training batches, and keeps what the feature loss (None for logits alone) needs.

    On CUDA it runs on a stream of its own, beside what the student does; elsewhere at once. `autocast` is that of the
    student's forward: without it the teacher's takes several times as long. `prefix` names one of several in errors.
    With a `head`, a language model that runs gives what that reads in place of its logits.
    """

    teacher: Teacher | CachedTeacher | TeacherEnsemble
    loss: FeatureLoss | None
    logits: bool
    autocast: Callable[[], AbstractContextManager[None]]
    prefix: str = ""
    head: LanguageHead | None = None

    def __call__(self, batch: Mapping[str, Any]) -> TeacherOutputs:
        """Return the teacher's outputs for a batch; `wait` before they are used."""
        stream = self.teacher.stream
        if stream is None:
            return self._run(batch)
        student = torch.cuda.current_stream(stream.device)
        # The batch is ready when what was queued before is done.
        stream.wait_stream(student)
        with torch.cuda.stream(stream):
            outputs = self._run(batch)
        for tensor in outputs.tensors():
            # Its memory must not be given away before the student's stream is done with it.
            tensor.record_stream(student)
        return outputs

    def _run(self, batch: Mapping[str, Any]) -> TeacherOutputs:
        wanted: dict[str, Any] = {"logits": self.logits, "features": self.loss is not None, "loss": self.loss}
        with self.autocast():
            if self.head is not None and isinstance(self.teacher, Teacher):
                return self.teacher.run(batch, **wanted, head=self.head)
            return self.teacher.run(batch, **wanted)

    def whole(self, outputs: TeacherOutputs) -> TeacherOutputs:
        """Return outputs with all logits, where the head gave none so far."""
        if outputs.hidden is None or self.head is None:
            return outputs
        with torch.no_grad(), self.autocast():
            return replace(outputs, logits=self.head(outputs.hidden), hidden=None)

    def wait(self) -> None:
        """Make what is queued from now on wait for the teacher; the host does not."""
        stream = self.teacher.stream
        if stream is not None:
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    def check_finite(self, batch: Mapping[str, Any]) -> None:
        """Run each teacher on a batch, and raise `TeacherOutputError` for NaN and infinity outside the padding."""
        if isinstance(self.teacher, TeacherEnsemble):
            for runner in self.alone():
                runner.check_finite(batch)
            return
        if isinstance(self.teacher, Teacher) and self.teacher.runs_together:
            # The other processes would not take part.
            return
        outputs = self(batch)
        self.wait()
        hidden = [] if outputs.hidden is None else outputs.hidden.split(1)
        check_finite(replace(outputs, hidden=None), self.teacher.layer_names, self.prefix)
        for sample, row in enumerate(hidden):
            # All logits may be too much: they were never together before.
            mask = None if outputs.mask is None else outputs.mask[sample : sample + 1]
            check_finite(self.whole(TeacherOutputs(mask=mask, hidden=row)), [], self.prefix, [sample])

    def alone(self) -> list[TeacherRunner]:
        """Return a runner for each teacher."""
        if not isinstance(self.teacher, TeacherEnsemble):
            return [self]
        members = zip(self.teacher.teachers, self.teacher.losses(self.loss), strict=True)
        return [
            replace(self, teacher=teacher, loss=loss, prefix=teacher_prefix(number))
            for number, (teacher, loss) in enumerate(members)
        ]
