"""The part of a trainer that shows what is learned: loss terms and the association, averaged rightly and logged."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from transformers import Trainer

from ..models.tasks import Task
from .inspection import Inspection
from .meters import LossMeter

logger = logging.getLogger(__name__)

# A mean task loss within these shares of that of equal probabilities is that of a student that has learned nothing;
# above them it has learned something else, such as a teacher that knows better than wrong labels.
IDLE_SHARES = (0.99, 1.05)

# In fewer steps nobody expects one to have learned much.
IDLE_STEPS = 50

# The loss that tells is the mean over at least so many of the last steps: a window may be a single batch.
JUDGED_STEPS = 20


class ObservingTrainer(Trainer):
    """Averages loss terms and association weights over logging windows; a base of `DistillationTrainer`.

    Nothing is read back from the device before a window ends, and a window costs one reduction over processes.
    """

    _association: np.ndarray | None
    _task_losses: deque[tuple[int, float]]
    _probe: Inspection | None
    _task: Task
    _warned_of_collapse: bool

    def association(self) -> np.ndarray | None:
        """Return the mean association weights of the last logging window.

        Returns:
            (student_layer, teacher_layer), rows summing to 1 over the teacher layers that a student layer learns
            from, or would if it were not left to the logits; None when nothing was logged yet or there is no
            association.
        """
        return None if self._association is None else self._association.copy()

    def start_averages(self, step: int) -> None:
        """Begin a logging window at an optimizer step, forgetting what was summed before."""
        self._meter = LossMeter()
        self._task_losses = deque()
        self._started_at = self._averaged_to = step

    def finish_averages(self) -> dict[str, float]:
        """End the logging window on all processes at once; return its terms and keep its association."""
        if self._meter.empty:
            return {}
        steps = self.state.global_step - self._averaged_to
        averages = self._meter.average(steps, self._sum_over_processes)
        self._averaged_to = self.state.global_step
        self._remember_task_loss(steps, averages.terms)
        if averages.association is not None:
            self._association = averages.association
        bound = None if self.feature_loss is None else self.feature_loss.upper_bound
        if averages.collapsed(bound) and not self._warned_of_collapse and self.is_world_process_zero():
            self._warned_of_collapse = True
            layer = self.teacher_layer_names[int(self._association[0].argmax())]  # type: ignore[index]
            logger.warning(
                "The association has collapsed: every student layer leans on teacher layer %s as far as it can, for "
                "every sample alike, so it carries no information. Use association='similarity', or raise "
                "association_temperature.",
                layer,
            )
        return averages.terms

    def _remember_task_loss(self, steps: int, terms: Mapping[str, float]) -> None:
        """Keep the last windows that make up `JUDGED_STEPS` steps."""
        if "task_loss" not in terms:
            return
        self._task_losses.append((steps, terms["task_loss"]))
        while sum(count for count, _ in self._task_losses) - self._task_losses[0][0] >= JUDGED_STEPS:
            self._task_losses.popleft()

    def warn_of_idle_student(self) -> None:
        """Say so when a classifier ends as it began, at chance: too strong a feature term can do that to a student.

        Where classes are unbalanced, chance is lower than that of equal probabilities, and nothing is said. Nor is
        there where the student is to end with the teacher's classifier: its own says nothing.
        """
        logits = None if self._probe is None else self._probe.student_logits
        classes = logits.shape[1] if logits is not None and logits.dim() == 2 else 1
        if classes < 2 or self._task != "single_label" or self.compute_loss_func is not None:
            return
        if self.feature_loss is None or self.feature_loss.reuses_teacher_head or not self._task_losses:
            return
        steps = self.state.global_step - self._started_at
        if self.feature_weight == 0 or steps < IDLE_STEPS:
            return
        judged = sum(count for count, _ in self._task_losses)
        loss = sum(count * value for count, value in self._task_losses) / max(judged, 1)
        chance = math.log(classes)
        if IDLE_SHARES[0] <= loss / chance <= IDLE_SHARES[1] and self.is_world_process_zero():
            logger.warning(
                "The student seems not to have learned its task: the task loss ended at %.3f, and equal "
                "probabilities for all %d classes give %.3f. The feature term may be why: it slows the first steps "
                "down. Lower feature_weight (it is %g), raise learning_rate (it is %g), or train for more steps "
                "(these were %d).",
                loss,
                classes,
                chance,
                self.feature_weight,
                self.args.learning_rate,
                steps,
            )

    def _record(self, terms: Mapping[str, tuple[float, Tensor]], features: Any) -> None:
        for name, (_, value) in terms.items():
            self._meter.add_term(name, value / self._counts.processes)
        if features is not None and "association" in features:
            self._meter.add_association(features["association"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what `Trainer` logs, with the terms of the window and the association's entropy beside the loss."""
        training = self._distils and "loss" in logs
        super().log({**logs, **self.finish_averages()} if training else logs, start_time)
        if training and self._association is not None:
            # Kept in the history, not printed: S * T numbers would bury the others.
            self.state.log_history[-1]["association"] = self._association.tolist()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count the student's operations alone: neither the teacher nor the calibration stays."""
        if not self._attached:
            return super().floating_point_ops(inputs)
        name = getattr(self.student, "main_input_name", "input_ids")
        return 6 * inputs[name].numel() * self._student_parameters if name in inputs else 0
