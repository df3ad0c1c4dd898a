"""The callback that a trainer adds for itself: the association in pictures and trackers, and the cache on disk."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ..publishing.card import ASSOCIATION_PICTURE
from ..publishing.plots import figure_to_array, plot_association, save_association_plot
from ..publishing.report.history import ASSOCIATION, PARTS
from ..teacher.cached import CachedTeacher
from .attachment import StudentAttachment
from .distillation import Distillation
from .monitor import Monitor
from .trackers import picture_senders, quarter, tensorboard_writer

logger = logging.getLogger(__name__)


class DistillationCallback(TrainerCallback):
    """Keeps the association visible and the teacher cache on disk; goes in front of all other callbacks.

    These get the plain student as their model, without what it is trained with.

    Args:
        monitor: Averages what is logged.
        teachers: Those for which a cache answers.
        handler: Holds the other callbacks, those of trackers perhaps among them.
        attachment: Joins losses and student; None where none is computed inside the student's forward.
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
        self._sent = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the averages at the step that training starts from, which is not 0 after a resume."""
        self.monitor.start(state.global_step)
        self._sent = quarter(state.global_step, state.max_steps)
        if self.attachment is not None:
            if self.attachment.loss is not None:
                self.attachment.loss.forget_collected()
            self.handler.model = self.attachment.plain_view()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write what the epoch added to the caches, where other processes and runs see it."""
        for teacher in self.teachers:
            teacher.flush()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Send the association to the trackers: once a quarter as a picture, and its weights to TensorBoard.

        There many curves do no harm.
        """
        association = self.monitor.last_association
        # Evaluations and the summary at the end are logged too, and have no window of their own.
        if association is None or "loss" not in (kwargs.get("logs") or {}):
            return
        # The last picture is sent when training ends.
        if self._sent < quarter(state.global_step, state.max_steps) < PARTS:
            self._sent = quarter(state.global_step, state.max_steps)
            self._send_picture(state)
        writer = tensorboard_writer(self.handler.callbacks)
        if writer is None:
            return
        for (s, t), weight in np.ndenumerate(association):
            student, teacher = self.monitor.student_layers[s], self.monitor.teacher_layers[t]
            writer.add_scalar(f"association/student {student}/teacher {teacher}", weight, state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Save the heat map, and send it to the trackers; a failure costs the picture alone."""
        self.monitor.finish(state.global_step)
        self._tell_cache_use(args, state)
        self.monitor.warn_of_idle_student(state.global_step, args.learning_rate)
        association = self.monitor.last_association
        if association is None or not state.is_world_process_zero:
            return
        names = (self.monitor.student_layers, self.monitor.teacher_layers)
        try:
            path = Path(args.output_dir) / ASSOCIATION_PICTURE
            path.parent.mkdir(parents=True, exist_ok=True)
            save_association_plot(association, path, *names)
        except Exception as error:  # a full disk, no matplotlib, or one that does not get on with its own parts
            logger.warning("The picture of the association was not saved (training is not affected): %s", error)
            return
        self._send_picture(state)

    def _tell_cache_use(self, args: TrainingArguments, state: TrainerState) -> None:
        """Say how much came from the cache, where the progress bar is read; elsewhere it is a line for information.

        A warning would be wrong, and information is not shown by default. Its rate is in the logs besides.
        """
        if not self.teachers or not state.is_world_process_zero:
            return
        said = f"Teacher cache {str(self.teachers[0].folder)!r}: {self.monitor.cache_use}."
        logger.info(said)
        if not args.disable_tqdm:
            tqdm.write(said)

    def _send_picture(self, state: TrainerState) -> None:
        """Send the heat map to every tracker that records; a failure costs the picture alone."""
        senders = picture_senders(self.handler.callbacks) if state.is_world_process_zero else []
        if not senders:
            return
        try:
            names = (self.monitor.student_layers, self.monitor.teacher_layers)
            assert self.monitor.last_association is not None
            picture = figure_to_array(plot_association(self.monitor.last_association, *names)[0])
            for send in senders:
                send(ASSOCIATION, picture, state.global_step)
        except Exception as error:  # a tracker's own, or matplotlib's
            logger.warning("The picture of the association was not sent (training is not affected): %s", error)


def install_callback(handler: CallbackHandler, distillation: Distillation) -> None:
    """Put the callback of a distillation in front of all others, in place of an earlier one's."""
    others = [entry for entry in handler.callbacks if not isinstance(entry, DistillationCallback)]
    teachers, attachment = distillation.pair.cached_teachers, distillation.attachment
    handler.callbacks = [DistillationCallback(distillation.monitor, teachers, handler, attachment), *others]
