"""What is shown of a training: loss terms and the association, averaged over logging windows, and two warnings."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from ..losses import FeatureLoss
from .meters import LossMeter
from .plan import Plan
from .services import Services

logger = logging.getLogger(__name__)
# A mean task loss within these shares of that of equal probabilities is that of a student that has learned nothing;
# above them it has learned something else, such as a teacher that knows better than wrong labels.
IDLE_SHARES = (0.99, 1.05)
# In fewer steps nobody expects one to have learned much.
IDLE_STEPS = 50
# The loss that tells is the mean over at least so many of the last steps: a window may be a single batch.
JUDGED_STEPS = 20


class Monitor:
    """Averages loss terms and association weights over logging windows.

    Nothing is read from the device before a window ends, and a window costs one reduction over processes.

    Args:
        custom_loss: Whether the task loss is a user's function, of which nothing is known.

    Attributes:
        judges_student: Whether a task loss at chance tells that the student has learned nothing.
        last_association: (S, T) mean weights of the last window that had any.
        task_losses: Steps and mean task loss of the last windows.
    """

    def __init__(
        self,
        plan: Plan,
        loss: FeatureLoss | None,
        services: Services,
        student_layers: Sequence[str],
        teacher_layers: Sequence[str],
        *,
        custom_loss: bool,
    ):
        self.plan = plan
        self.services = services
        self.student_layers = list(student_layers)
        self.teacher_layers = list(teacher_layers)
        self.upper_bound = None if loss is None else loss.upper_bound
        classifies = plan.task == "single_label" and plan.classes is not None and plan.classes > 1
        learns_features = loss is not None and not loss.reuses_teacher_head and plan.feature_weight > 0
        self.judges_student = classifies and learns_features and not custom_loss
        self.last_association: np.ndarray | None = None
        self._warned_of_collapse = False
        self.start(0)

    def start(self, step: int) -> None:
        """Begin a logging window at an optimizer step, forgetting what was summed before."""
        self._meter = LossMeter()
        self.task_losses: deque[tuple[int, float]] = deque()
        self._started_at = self._averaged_to = step

    def record(self, terms: Mapping[str, Tensor], features: Mapping[str, Tensor] | None) -> None:
        """Add a micro-batch's shares of the terms, and the association weights among its features."""
        for name, value in terms.items():
            self._meter.add_term(name, value)
        if features is not None and "association" in features:
            self._meter.add_association(features["association"])

    def finish(self, step: int) -> dict[str, float]:
        """End the logging window on all processes at once; return its terms and keep its association."""
        if self._meter.empty:
            return {}
        steps = step - self._averaged_to
        averages = self._meter.average(steps, self.services.reduce_sum)
        self._averaged_to = step
        if "task_loss" in averages.terms:
            self.task_losses.append((steps, averages.terms["task_loss"]))
            # Only the last windows, which make up `JUDGED_STEPS` steps.
            while sum(count for count, _ in self.task_losses) - self.task_losses[0][0] >= JUDGED_STEPS:
                self.task_losses.popleft()
        if averages.association is not None:
            self.last_association = averages.association
            if averages.collapsed(self.upper_bound):
                self._warn_of_collapse(averages.association)
        return averages.terms

    def warn_of_idle_student(self, step: int, learning_rate: float) -> None:
        """Warn when a classifier ends as it began, at chance: too strong a feature term can do that to a student.

        Where classes are unbalanced, chance is below equal probabilities, and nothing is said. Nor is there where the
        student ends with the teacher's classifier: its own says nothing.
        """
        steps = step - self._started_at
        if not self.judges_student or not self.task_losses or steps < IDLE_STEPS:
            return
        assert self.plan.classes is not None
        judged = sum(count for count, _ in self.task_losses)
        loss = sum(count * value for count, value in self.task_losses) / max(judged, 1)
        chance = math.log(self.plan.classes)
        if IDLE_SHARES[0] <= loss / chance <= IDLE_SHARES[1] and self.services.is_main:
            logger.warning(
                "The student seems not to have learned its task: the task loss ended at %.3f, and equal "
                "probabilities for all %d classes give %.3f. The feature term may be why: it slows the first steps "
                "down. Lower feature_weight (it is %g), raise learning_rate (it is %g), or train for more steps "
                "(these were %d).",
                loss,
                self.plan.classes,
                chance,
                self.plan.feature_weight,
                learning_rate,
                steps,
            )

    def _warn_of_collapse(self, association: np.ndarray) -> None:
        """Warn once that the association carries no information."""
        if self.services.is_main and not self._warned_of_collapse:
            self._warned_of_collapse = True
            logger.warning(
                "The association has collapsed: every student layer leans on teacher layer %s as far as it can, for "
                "every sample alike, so it carries no information. Use association='similarity', or raise "
                "association_temperature.",
                self.teacher_layers[int(association[0].argmax())],
            )
