"""Runs the teacher as training does: beside the student, in its mixed precision, keeping what the loss needs."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from ..features.targets import LayerMasks, TeacherTargets
from ..losses import FeatureLoss
from .cached import CachedTeacher
from .outputs import TeacherOutputs, check_finite
from .teacher import Teacher


class TeacherRunner:
    """Runs the teacher on training batches, and keeps what the feature loss (None for logits alone) needs.

    `autocast` is that of the student's forward: without it the teacher's takes several times as long.
    """

    def __init__(
        self,
        teacher: Teacher | CachedTeacher,
        loss: FeatureLoss | None,
        *,
        logits: bool,
        autocast: Callable[[], AbstractContextManager[None]],
    ):
        self.teacher = teacher
        self.loss = loss
        self.logits = logits
        self.autocast = autocast

    def __call__(self, batch: Mapping[str, Any]) -> TeacherOutputs:
        """Return the teacher's outputs for a batch; `wait` before they are used."""
        select = None if self.loss is None else self._select
        with self.autocast():
            return self.teacher.stream.run(
                lambda: self.teacher.run(batch, logits=self.logits, features=self.loss is not None, select=select)
            )

    def wait(self) -> None:
        """Make what is queued from now on wait for the teacher; the host does not."""
        self.teacher.stream.wait()

    def check_finite(self, batch: Mapping[str, Any]) -> None:
        """Run the teacher on a batch, and raise `TeacherOutputError` for NaN and infinity outside the padding."""
        outputs = self(batch)
        self.wait()
        check_finite(outputs, self.teacher.layer_names)

    def _select(self, features: Sequence[Tensor], mask: LayerMasks, phases: Callable[[], Tensor]) -> TeacherTargets:
        """Keep what the loss needs, so that the rest is freed before the student runs."""
        assert self.loss is not None
        return self.loss.select(features, mask, phases() if self.loss.samples_tokens else None)
