"""The callback that a trainer adds for itself: the association in pictures and TensorBoard, and the cache on disk."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

from ..publishing.card import ASSOCIATION_PICTURE
from ..publishing.plots import figure_to_array, plot_association, save_association_plot
from ..teacher.cached import CachedTeacher
from .attachment import StudentAttachment
from .distillation import Distillation
from .monitor import Monitor

logger = logging.getLogger(__name__)


class DistillationCallback(TrainerCallback):
    """Keeps the association visible and the teacher cache on disk; goes in front of all other callbacks.

    These get the plain student as their model, without what it is trained with.

    Args:
        monitor: Averages what is logged.
        teachers: Those for which a cache answers.
        handler: Holds the other callbacks, TensorBoard's perhaps among them.
        attachment: Joins feature loss and student; None without a feature loss.
    """

    def __init__(
        self,
        monitor: Monitor,
        teachers: Sequence[CachedTeacher],
        handler: CallbackHandler,
        attachment: StudentAttachment | None,
    ):
        self.monitor = monitor
        self.teachers = teachers
        self.handler = handler
        self.attachment = attachment

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the averages at the step that training starts from, which is not 0 after a resume."""
        self.monitor.start(state.global_step)
        if self.attachment is not None:
            self.attachment.loss.forget_collected()
            self.handler.model = self.attachment.plain_view()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write what the epoch added to the caches, where other processes and runs see it."""
        for teacher in self.teachers:
            teacher.flush()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Send the mean weight of every pair to TensorBoard, where many curves do no harm."""
        association = self.monitor.last_association
        writer = self._tensorboard_writer()
        # Evaluations and the summary at the end are logged too, and have no window of their own.
        if association is None or writer is None or "loss" not in (kwargs.get("logs") or {}):
            return
        for (s, t), weight in np.ndenumerate(association):
            student, teacher = self.monitor.student_layers[s], self.monitor.teacher_layers[t]
            writer.add_scalar(f"association/student {student}/teacher {teacher}", weight, state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Save the heat map, and send it to TensorBoard when that is on; a failure costs the picture alone."""
        self.monitor.finish(state.global_step)
        self.monitor.warn_of_idle_student(state.global_step, args.learning_rate)
        association = self.monitor.last_association
        if association is None or not state.is_world_process_zero:
            return
        names = (self.monitor.student_layers, self.monitor.teacher_layers)
        try:
            path = Path(args.output_dir) / ASSOCIATION_PICTURE
            path.parent.mkdir(parents=True, exist_ok=True)
            save_association_plot(association, path, *names)
            writer = self._tensorboard_writer()
            if writer is not None:
                picture = figure_to_array(plot_association(association, *names)[0])
                writer.add_image("association", picture, state.global_step, dataformats="HWC")
        except Exception as error:  # a full disk, no matplotlib, or one that does not get on with its own parts
            logger.warning("The picture of the association was not saved (training is not affected): %s", error)

    def _tensorboard_writer(self) -> Any:
        boards = (entry for entry in self.handler.callbacks if isinstance(entry, TensorBoardCallback))
        return getattr(next(boards, None), "tb_writer", None)


def install_callback(handler: CallbackHandler, distillation: Distillation) -> None:
    """Put the callback of a distillation in front of all others, in place of an earlier one's."""
    others = [entry for entry in handler.callbacks if not isinstance(entry, DistillationCallback)]
    teachers, attachment = distillation.pair.cached_teachers, distillation.attachment
    handler.callbacks = [DistillationCallback(distillation.monitor, teachers, handler, attachment), *others]
