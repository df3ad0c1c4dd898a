"""Shows what was learned: resets the averages, and keeps the association as a picture and in TensorBoard."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ..publishing.plots import figure_to_array, plot_association, save_association_plot

logger = logging.getLogger(__name__)

ASSOCIATION_PICTURE = "association.png"


class AssociationCallback(TrainerCallback):
    """Keeps the association visible; a trainer adds it for itself, in front of the reporting integrations.

    Args:
        trainer: The trainer whose association is shown.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the averages at the step that training starts from, which is not 0 after a resume."""
        self.trainer.start_averages(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Send the mean weight of every pair to TensorBoard, where many curves do no harm."""
        association = self.trainer.association()
        writer = self._tensorboard_writer()
        # Evaluations and the summary at the end are logged too, and have no window of their own.
        if association is None or writer is None or "loss" not in (kwargs.get("logs") or {}):
            return
        for (s, t), weight in np.ndenumerate(association):
            student, teacher = self.trainer.student_layer_names[s], self.trainer.teacher_layer_names[t]
            tag = f"association/student {student}/teacher {teacher}"
            writer.add_scalar(tag, weight, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the heat map, and send it to TensorBoard when that is on; a failure costs the picture alone."""
        self.trainer.finish_averages()
        self.trainer.warn_of_idle_student()
        association = self.trainer.association()
        if association is None or not state.is_world_process_zero:
            return
        names = (self.trainer.student_layer_names, self.trainer.teacher_layer_names)
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
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                return callback.tb_writer
        return None
