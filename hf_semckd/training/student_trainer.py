"""A trainer whose student stays a plain model: in evaluations, in checkpoints and in what it saves."""

import logging
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel, Trainer

from ..config import SemCKDConfig
from ..data.samples import column_names
from ..errors import CheckpointError
from ..files import saving
from ..losses import FeatureLoss
from ..teacher.cached import CachedTeacher
from .attachment import without_feature_loss
from .checkpoint import (
    RESUMED,
    check_optimizer,
    finish_folder,
    recorded_arguments,
    reload_student,
    resume_feature_loss,
    save_feature_loss,
    warn_of_missing,
)
from .distillation import Distillation
from .engines import saves_in_parts
from .guard import in_any_process, infinite_buffers, refuse_non_finite
from .pair import Pair
from .reasons import used_settings
from .sealing import break_seal, fault_of, seal

logger = logging.getLogger(__name__)


class StudentTrainer(Trainer):
    """`transformers.Trainer` that saves and reloads the student without what it is trained with.

    Without distillation `pair` and `distillation` are None, the latter also before it is built.
    """

    args: SemCKDConfig
    pair: Pair | None
    distillation: Distillation | None
    _signature_columns: list[str] | None

    @property
    def student(self) -> Any:
        """The plain student; while training it holds the feature loss as a submodule."""
        model = self.model
        return None if model is None else self.accelerator.unwrap_model(model, keep_torch_compile=False)

    @property
    def teacher(self) -> Any:
        """The frozen teacher in evaluation mode, or None without distillation; loaded now if it was not needed yet.

        Several come as an `nn.ModuleList`.
        """
        if self.pair is None:
            return None
        teachers = self.pair.teachers
        models = [(teacher.load() if isinstance(teacher, CachedTeacher) else teacher).model for teacher in teachers]
        return models[0] if len(models) == 1 else nn.ModuleList(models).eval()

    @property
    def student_layer_names(self) -> list[str]:
        """Names of the student layers that are captured: hidden-state indices or module names.

        Between CNNs SemCKD leaves the last one to the logits (`feature_loss.compared` tells how many learn).
        """
        return [] if self.pair is None else self.pair.student_layer_names

    @property
    def teacher_layer_names(self) -> list[str]:
        """Names of the teacher layers that are learned from; of several teachers `teachers.0.1` and the like."""
        return [] if self.pair is None else self.pair.teacher_layer_names

    @property
    def feature_loss(self) -> FeatureLoss | None:
        """The feature loss that is trained with the student, or None."""
        return None if self.distillation is None else self.distillation.loss

    def association(self) -> np.ndarray | None:
        """Return the mean association weights (student_layer, teacher_layer) of the last logging window, or None.

        Rows add up to 1 over the teacher layers; also those of layers that are left to the logits. The layers
        of several teachers stand side by side, and those of each add up to its share of `teacher_weights`.
        """
        found = None if self.distillation is None else self.distillation.monitor.last_association
        return None if found is None else found.copy()

    def distillation_settings(self) -> dict[str, Any]:
        """Return the settings of the distillation, with what is used where they were left open, ready for JSON."""
        return self.args.distillation_settings() if self.distillation is None else dict(self.distillation.settings)

    @property
    def _infinite_buffers(self) -> frozenset[str]:
        found = self.distillation
        # Without distillation nobody has looked at them before the training.
        return infinite_buffers(self.model) if found is None else found.guard.infinite

    @property
    def _layer_names(self) -> dict[str, list[str]]:
        return {"student_layers": self.student_layer_names, "teacher_layers": self.teacher_layer_names}

    def _set_signature_columns_if_needed(self) -> None:
        """Keep what the teacher takes besides what the student takes; `_prepare_inputs` tells them apart."""
        first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        kept = self._signature_columns
        if first and self.pair is not None and kept is not None:
            extra = self.pair.router.extra_columns(kept, column_names(self.train_dataset))
            self._signature_columns = [*kept, *extra]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        return inputs if self.pair is None or self.model.training else self.pair.router.student_inputs(inputs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count the student's operations alone: neither the teacher nor the feature loss stays."""
        if self.distillation is None or not self.distillation.attached:
            return super().floating_point_ops(inputs)
        return self.distillation.student_operations(inputs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict with the student as it will be; see `Trainer.evaluation_loop`."""
        with self._finished_student():
            return super().evaluation_loop(*args, **kwargs)

    def _finished_student(self) -> ExitStack:
        """Return a context in which the student is what it will be in the end; SimKD gives it another classifier."""
        finished = ExitStack()
        if self.distillation is not None:
            finished.callback(self.distillation.finish_student())
        return finished

    def _plain_student(self) -> AbstractContextManager[None]:
        return nullcontext() if self.distillation is None else self.distillation.plain_student()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with saving(folder.name, folder), self._finished_student():
            if self.distillation is not None:
                self.distillation.guard.check_pending(self.state.global_step)
            refuse_non_finite(self.model, self.state.global_step, self.accelerator, but=self._infinite_buffers)
            if self.args.should_save:
                break_seal(folder)
            super()._save_checkpoint(model, trial)
            if not self.args.push_to_hub:
                self._seal(folder)

    def _seal(self, checkpoint: Path) -> None:
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(checkpoint)
        # Until then it does not count as whole, and it may be the best one that all are about to load.
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student, whole; see `Trainer.save_model`, which writes nothing where FSDP's state is in parts.

        Raises `NonFiniteLossError`, and writes nothing, where weights or buffers hold NaN or infinity.
        """
        # Without an engine the main process may save alone. Weights are the same in all; buffers need not be.
        together = None if self._reloads_here else self.accelerator
        with self._plain_student() if self._reloads_here else nullcontext():
            saved, known = self.args.should_save, self._infinite_buffers
            refuse_non_finite(self.model, self.state.global_step, together, buffers=saved, but=known)
        super().save_model(output_dir, _internal_call)
        if saves_in_parts(self.accelerator):
            self._save(output_dir, self.accelerator.get_state_dict(self.model))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        with saving("The student", folder), self._plain_student():
            super()._save(output_dir, None if state_dict is None else without_feature_loss(state_dict))
        if self.args.should_save and self.pair is not None:
            settings, layers = self.distillation_settings(), self._layer_names
            reasons = used_settings(self.args, settings, layers, self.feature_loss)
            record = {"method": self._method, "layers": layers, "settings": reasons}
            arguments = recorded_arguments(self.args, self.state)
            models = self.student, self.pair.teacher_models
            finish_folder(folder, arguments, *models, settings, record, self.train_dataset)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        distillation, loss = self.distillation, self.feature_loss
        if distillation is not None and loss is not None and distillation.attached:
            # What the last step observed belongs to this checkpoint, on every process and with every engine.
            services = distillation.objective.services
            loss.synchronize(services.reduce_sum, rank=services.rank, world=services.processes)
            if self.args.should_save and self._reloads_here:
                save_feature_loss(loss, output_dir)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._reloads_here:
            optim = getattr(self.args.optim, "value", self.args.optim)
            settings = {"method": self._method, "optim": optim, **self.distillation_settings()}
            check_optimizer(self.optimizer, checkpoint, settings)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        distillation, loss = self.distillation, None
        if not self._reloads_here:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with self._plain_student():
            if distillation is not None and isinstance(self.model, PreTrainedModel):
                reload_student(self.model, resume_from_checkpoint)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        if distillation is not None and distillation.attached and distillation.loss is not None:
            loss = distillation.loss
            resume_feature_loss(loss, resume_from_checkpoint)
        random_state = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        learns = loss is not None and bool(loss.state_dict())
        is_main = self.is_local_process_zero()
        warn_of_missing(resume_from_checkpoint, random_state, feature_loss=learns, is_main=is_main)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        fault = fault_of(best, RESUMED if self._reloads_here else ())
        # Nodes without a file system in common may know of no best checkpoint, and not come here.
        together = not self._reloads_here or self.args.save_on_each_node
        if in_any_process(fault is not None, self.accelerator) if together else fault is not None:
            self._keep_last(best, fault or "another process finds it damaged")
            return
        reloads = self.distillation is not None and self._reloads_here
        # An engine's checkpoint holds the feature loss as well.
        with self._plain_student() if self._reloads_here else nullcontext():
            if not reloads or not isinstance(self.model, PreTrainedModel):
                super()._load_best_model()
                return
            try:
                reload_student(self.model, best)
            except CheckpointError as error:
                self._keep_last(best, " ".join(str(error).split()))

    def _keep_last(self, best: Path, why: str) -> None:
        """Say that the best checkpoint was not loaded: an error would lose what is trained, now that training is over.

        `Trainer` would also delete all checkpoints but the best.
        """
        self.state.best_model_checkpoint = None
        if self.is_local_process_zero():
            told = "The best checkpoint could not be loaded (%s: %s). The student keeps its last weights, of step %d, "
            told += "and state.best_model_checkpoint is None; to use another checkpoint, load it with from_pretrained."
            logger.warning(told, best.name, why, self.state.global_step)

    @property
    def _reloads_here(self) -> bool:
        """Whether checkpoints hold whole tensors; FSDP and DeepSpeed carry the feature loss in their own state."""
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    @property
    def _method(self) -> str:
        return "KD" if self.feature_loss is None else self.feature_loss.title
