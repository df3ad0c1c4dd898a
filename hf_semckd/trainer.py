"""Trainers that distil: `transformers.Trainer` with a teacher, and nothing else changed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .callbacks import AssociationCallback
from .checkpoint import load_calibration, reload_student, save_calibration, save_settings
from .config import SemCKDConfig
from .errors import NonFiniteLossError, message
from .features import FeatureCapture
from .hub import PublishingMixin
from .losses import FeatureLoss, SemCKDLoss
from .meters import LossMeter
from .modeling import DistillationTargets, StudentAttachment, logits_of, without_calibration
from .optimization import BorrowedOptimizer, add_calibration_groups
from .preflight import (
    Probe,
    check_dataset,
    check_feature_loss,
    check_label_names,
    check_labels,
    check_models,
    check_parallelism,
    check_published_batches,
    check_teacher_given,
    first_samples,
    probe,
    untouched_random_state,
)
from .teacher import TEACHER_PREFIX, Teacher, TeacherOutputs, forward_parameters, load_model, select_inputs
from .terms import Task, Window, count_window, cross_entropy, logit_loss_sum, task_of

logger = logging.getLogger(__name__)

ModelSource = nn.Module | str | os.PathLike[str]
PICKLED_ARGUMENTS = "training_args.bin"


class DistillationTrainer(PublishingMixin, Trainer):
    """`transformers.Trainer` that also learns from a frozen teacher.

    total loss = task_weight * task + logit_weight * logits + feature_weight * features, each averaged over the
    samples (or labelled tokens) of the whole optimizer step, however it is cut into micro-batches and processes.
    With both distillation weights 0 this is `Trainer`, bit for bit.

    Args:
        model: The student: a model, or a name or folder to load it from.
        args: A `SemCKDConfig`; plain `TrainingArguments` get the distillation's defaults.
        teacher_model: The teacher, likewise. It is frozen and put into evaluation mode, and keeps its precision.
        feature_loss: `None` (logits only), `"semckd"`, or a `FeatureLoss` made for the layers that are chosen.
        data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_loss_func, compute_metrics,
            callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics: As in `Trainer`. An
            optimizer that is passed in holds the projections as one more group for the time of training.

    Raises:
        InputError: When models and data do not fit together; always before the first step.
        ConfigurationError: When the arguments cannot work.
    """

    def __init__(
        self,
        model: ModelSource | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Tensor] | None = None,
        *,
        teacher_model: ModelSource | None = None,
        feature_loss: FeatureLoss | str | None = None,
    ):
        args = _as_config(args)
        # Trainer's constructor calls overridden methods: what they read must exist before it runs.
        self._attachment: StudentAttachment | None = None
        self._teacher: Teacher | None = None
        self._borrowed: BorrowedOptimizer | None = None
        self.feature_loss: FeatureLoss | None = None
        self._feature_loss_source = check_feature_loss(feature_loss)
        super().__init__(
            model=None if model is None else load_model(model, "student"),
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self._owns_optimizer = optimizers[0] is None
        self._probe: Probe | None = None
        self._task: Task = "single_label"
        self._window = Window()
        self._meter = LossMeter()
        self._averaged_to = 0
        self._association: np.ndarray | None = None
        self._warned_of_collapse = False
        if self._distils:
            self._set_up_distillation(teacher_model)

    @property
    def student(self) -> Any:
        """The plain student; while training it holds the feature loss as a submodule."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def teacher(self) -> Any:
        """The frozen teacher in evaluation mode, or None without distillation."""
        return None if self._teacher is None else self._teacher.model

    @property
    def student_layer_names(self) -> list[str]:
        """Names of the student layers that learn: hidden-state indices or module names."""
        return self._student_capture.names() if self._distils_features else []

    @property
    def teacher_layer_names(self) -> list[str]:
        """Names of the teacher layers that are learned from."""
        return self._teacher.capture.names() if self._teacher is not None and self._distils_features else []

    def association(self) -> np.ndarray | None:
        """Return the mean association weights of the last logging window.

        Returns:
            (student_layer, teacher_layer), rows summing to 1 over the teacher layers that a student layer learns
            from, or None when nothing was logged yet or there is no association.
        """
        return None if self._association is None else self._association.copy()

    # ---- Setting up --------------------------------------------------------------------------------------------

    @property
    def _distils_features(self) -> bool:
        return self.args.distils_features and self._feature_loss_source is not None

    @property
    def _distils(self) -> bool:
        return self.args.distils_logits or self._distils_features

    @property
    def _attached(self) -> bool:
        return self._attachment is not None and self._attachment.attached

    def _set_up_distillation(self, teacher_model: ModelSource | None) -> None:
        check_teacher_given(teacher_model, self.args)
        check_parallelism(self.args)
        # The terms are scaled here for accumulation and processes; Trainer must not do it again.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = False
        teacher = load_model(teacher_model, "teacher", like=self.student)  # type: ignore[arg-type]
        check_models(self.student, teacher)
        check_label_names(self.student, teacher)
        self._teacher = Teacher(teacher, self.args.teacher_layers)
        self._teacher.to(self.args.device)
        self._student_capture = FeatureCapture(self.student, self.args.student_layers, "student")
        self._student_takes = set(forward_parameters(self.student))
        self.callback_handler.callbacks.insert(0, AssociationCallback(self))
        if self.train_dataset is not None:
            check_dataset(self.train_dataset, (self.student, teacher), self.args.remove_unused_columns)
            self._build()

    def _build(self) -> None:
        """Probe both models with a small batch and make the feature loss for the layers that were found."""
        assert self._teacher is not None
        with untouched_random_state(self.args.seed):
            batch = self._prepare_input(self._probe_batch())
            check_labels(batch, self.label_names, self.args)
            self.label_names = self.label_names or [name for name in ("labels",) if name in batch]
            config = self.args
            self._probe = probe(
                self.student,
                self._student_capture,
                self._teacher,
                batch,
                features=self._distils_features,
                logits=config.distils_logits,
            )
            if self._probe.student_logits is not None:
                problem = getattr(getattr(self.student, "config", None), "problem_type", None)
                self._task = task_of(self._probe.student_logits, batch.get("labels"), problem)
            if self._distils_features:
                self.feature_loss = self._make_feature_loss(self._probe)

    def _make_feature_loss(self, found: Probe) -> FeatureLoss:
        loss = self._feature_loss_source
        if isinstance(loss, str):
            loss = SemCKDLoss.from_config(
                found.student_specs, found.teacher_specs, self.args, tokens_aligned=found.tokens_aligned
            )
        assert isinstance(loss, FeatureLoss)
        if loss.required_batch_size is not None:
            size = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
            check_published_batches(self.args, size, self.args.world_size)
        loss.automatic_synchronization = False
        dtype = next((p.dtype for p in self.student.parameters() if p.dtype is torch.float64), torch.float32)
        return loss.to(device=self.args.device, dtype=dtype)

    def _probe_batch(self) -> Mapping[str, Any]:
        """Return a small training batch as the student will see it."""
        if self.train_dataset is None:
            return next(iter(self.get_train_dataloader()))
        dataset, collator = self.train_dataset, self.data_collator
        if hasattr(dataset, "remove_columns") and hasattr(dataset, "column_names") and dataset.column_names:
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="training")
        return collator(first_samples(dataset))

    # ---- Training: attach, count, weigh ------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train the student; see `Trainer.train`. The student is the plain model again afterwards, whatever happens.

        Raises:
            NonFiniteLossError: When a loss term becomes NaN or infinite; the last checkpoint is intact.
            TeacherOutputError: When it is the teacher's doing.
            CheckpointError: When a checkpoint to resume from is incomplete.
        """
        if self._distils and self._probe is None:
            self._build()
        self._attach()
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self._detach()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a new student, with a fresh feature loss when training has begun."""
        model = super().call_model_init(trial)
        if self._attachment is not None and self.is_in_train:
            self._attachment.detach()
            self.model = model
            self._build()
            self._attach()
        return model

    def _attach(self) -> None:
        if self.feature_loss is not None and self._distils_features:
            if self._attachment is None or self._attachment.student is not self.student:
                self._attachment = StudentAttachment(self.student, self.feature_loss, self._student_capture)
            self._student_parameters = _parameters_outside_embeddings(self.student)
            self._attachment.attach()

    def _detach(self) -> None:
        if self._borrowed is not None:
            self._borrowed.give_back()
            self._borrowed = None
        if self._attachment is None or not self._attachment.removable:
            return
        self._attachment.detach()
        # A wrapper made for the attached student is no use for the plain one; the next train() wraps again.
        self.model_wrapped = self.model
        self.accelerator._models = [entry for entry in self.accelerator._models if not _wraps(entry, self.model)]

    def _plain_student(self) -> AbstractContextManager[None]:
        return nullcontext() if self._attachment is None else self._attachment.suspended()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the student's optimizer as `Trainer` does, and append the feature loss's parameters."""
        if not self._attached or self.feature_loss is None:
            return super().create_optimizer(*args, **kwargs)
        with self._plain_student():
            optimizer = super().create_optimizer(*args, **kwargs)
        if self._owns_optimizer:
            rate = self.args.resolved_calibration_learning_rate()
            add_calibration_groups(
                self.optimizer, self.feature_loss, learning_rate=rate, weight_decay=self.args.weight_decay
            )
        elif self._borrowed is None:
            inner = getattr(self.optimizer, "optimizer", self.optimizer)
            scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
            self._borrowed = BorrowedOptimizer(inner, scheduler, self.feature_loss)
        return optimizer

    def _set_signature_columns_if_needed(self) -> None:
        """Keep what the teacher takes besides what the student takes; `_prepare_inputs` tells them apart."""
        first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if first and self._teacher is not None:
            extra = [name for name in forward_parameters(self.teacher) if name not in self._signature_columns]
            columns = _columns(self.train_dataset)
            extra += [name for name in columns if name.startswith(TEACHER_PREFIX)]
            if not isinstance(self.student, PreTrainedModel) and not set(self._signature_columns) & set(columns):
                extra += columns
            self._signature_columns = [*self._signature_columns, *extra]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self._teacher is None or self.model.training:
            return inputs
        return self._student_inputs(inputs)

    def _student_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the student gets of a batch: not the teacher's columns, nor those only the teacher names."""
        chosen = select_inputs(self.student, inputs) if not isinstance(self.student, PreTrainedModel) else None
        teacher_only = set(forward_parameters(self.teacher)) - self._student_takes
        own = {
            key: value
            for key, value in inputs.items()
            if key not in teacher_only and not key.startswith(TEACHER_PREFIX)
        }
        if chosen is None:
            return own
        labels = {key: value for key, value in own.items() if key in ("labels", "label", "label_ids")}
        return {**chosen, **labels} if not hasattr(self.student, "get_base_model") else own

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Fetch the micro-batches of an optimizer step, and count what its terms are averages over, on all processes."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._distils and batches:
            self._window = count_window(batches, self._task, self._shifts_labels, self._sum_over_processes)
            self._window.processes = self.accelerator.num_processes
            self._update_statistics(batches)
        return batches, items

    @property
    def _shifts_labels(self) -> bool:
        base = self.student.get_base_model() if hasattr(self.student, "get_base_model") else self.student
        return type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.args.device), reduction="sum").to(tensor.device)

    def _update_statistics(self, batches: list[Any]) -> None:
        """Merge teacher statistics once an optimizer step; the first step takes them from its own samples."""
        loss = self.feature_loss
        if loss is None or not self._attached:
            return
        loss.collecting = True
        if loss.needs_statistics:
            for batch in batches:
                outputs = self._run_teacher(self._prepare_input(batch), logits=False)
                loss.observe(outputs.features, outputs.mask)
            loss.collecting = False
        loss.synchronize(self._sum_over_processes)

    def _run_teacher(self, batch: Mapping[str, Any], *, logits: bool) -> TeacherOutputs:
        assert self._teacher is not None
        return self._teacher.run(batch, logits=logits, features=self._distils_features)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the distillation loss while training, and what `Trainer` returns otherwise.

        Raises:
            NonFiniteLossError: When a term is NaN or infinite, before it reaches a weight.
            TeacherOutputError: When it is the teacher's doing.
        """
        if not (self._distils and self.model.training and self.is_in_train):
            return self._plain_loss(model, inputs, return_outputs, num_items_in_batch)
        targets = self._run_teacher(inputs, logits=self.args.distils_logits)
        student_inputs = self._student_inputs(inputs)
        labels = student_inputs.get("labels")
        if self._drops_labels:
            student_inputs.pop("labels", None)
        keyword = {}
        if self._distils_features:
            mask = student_inputs.get("attention_mask")
            keyword = DistillationTargets(targets.features, mask, targets.mask).as_keyword()
        outputs = model(**student_inputs, **keyword)
        outputs, features = outputs if keyword else (outputs, None)
        terms = self._terms(outputs, features, targets, inputs, labels)
        loss = sum(weight * term for weight, term in terms.values())
        self._check_finite(loss, terms, targets)
        self._record(terms, features)
        if not hasattr(Trainer, "loss_is_scaled_for_ga") and self.compute_loss_func is None:
            # Before transformers 5.2x Trainer divides by the accumulation steps once more.
            loss = loss * self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    @property
    def _drops_labels(self) -> bool:
        """Whether the student must not compute the task loss by itself."""
        custom = self.compute_loss_func is not None or self.label_smoother is not None
        return custom or self.args.task_weight == 0 or "labels" not in self._student_takes

    def _plain_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, items: Any) -> Any:
        if not self._distils or "labels" in self._student_takes or "labels" not in inputs or self.compute_loss_func:
            return super().compute_loss(model, inputs, return_outputs, items)
        labels = inputs["labels"]
        outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
        logits = logits_of(outputs, "student")
        loss = cross_entropy(logits, labels)
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def _terms(
        self, outputs: Any, features: Any, targets: TeacherOutputs, batch: Mapping[str, Any], labels: Any
    ) -> dict[str, tuple[float, Tensor]]:
        """Return weight and value of each term; values are shares of the window's mean, times the processes."""
        window, args = self._window, self.args
        terms: dict[str, tuple[float, Tensor]] = {}
        items = window.task_items.popleft()
        if args.task_weight > 0 and items > 0:
            terms["task_loss"] = (args.task_weight, self._task_loss(outputs, labels, items))
        if args.distils_logits:
            assert targets.logits is not None
            student = logits_of(outputs, "student")
            total = logit_loss_sum(student, targets.logits, batch, args.temperature, self._task, self._shifts_labels)
            terms["logit_loss"] = (args.logit_weight, total * window.logit_scale())
        if features is not None:
            share = features["per_sample"].sum() * window.sample_scale()
            terms["feature_loss"] = (args.feature_weight, share)
        if not terms:
            # A micro-batch without a single label: it still has to reach every parameter of every process.
            terms["task_loss"] = (0.0, logits_of(outputs, "student").sum() * 0.0)
        return terms

    def _task_loss(self, outputs: Any, labels: Any, items: float) -> Tensor:
        window = self._window
        if self.compute_loss_func is not None:
            total = torch.tensor(window.totals[0], device=self.args.device)
            return self.compute_loss_func(outputs, labels, num_items_in_batch=total) * window.processes
        if self.label_smoother is not None and labels is not None:
            loss = self.label_smoother(outputs, labels, shift_labels=self._shifts_labels)
        elif self._drops_labels:
            loss = cross_entropy(logits_of(outputs, "student"), labels)
        else:
            loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
        return loss * window.task_scale(items)

    def _check_finite(self, loss: Any, terms: Mapping[str, tuple[float, Tensor]], targets: TeacherOutputs) -> None:
        if torch.isfinite(loss):
            return
        assert self._teacher is not None
        self._teacher.check_finite(targets)
        broken = [f"{name} = {float(value):g}" for name, (_, value) in terms.items() if not torch.isfinite(value)]
        raise NonFiniteLossError(
            message(
                f"The loss is not finite at step {self.state.global_step + 1}; training stops before it reaches a weight",
                received=", ".join(broken) or "a sum of finite terms that overflows",
                expected="finite loss terms",
                todo="lower the learning rate, clip gradients (max_grad_norm), use bf16 instead of fp16, and go on from the "
                "last checkpoint with train(resume_from_checkpoint=True)",
            )
        )

    # ---- What is shown -----------------------------------------------------------------------------------------

    def start_averages(self, step: int) -> None:
        """Begin a logging window at an optimizer step, forgetting what was summed before."""
        self._meter = LossMeter()
        self._averaged_to = step

    def finish_averages(self) -> dict[str, float]:
        """End the logging window on all processes at once; return its terms and keep its association."""
        if self._meter.empty:
            return {}
        averages = self._meter.average(self.state.global_step - self._averaged_to, self._sum_over_processes)
        self._averaged_to = self.state.global_step
        if averages.association is not None:
            self._association = averages.association
        bound = None if self.feature_loss is None else self.feature_loss.upper_bound
        if averages.collapsed(bound) and not self._warned_of_collapse and self.is_world_process_zero():
            self._warned_of_collapse = True
            layer = self.teacher_layer_names[int(self._association[0].argmax())]  # type: ignore[index]
            logger.warning(
                "The association has collapsed: every student layer leans on teacher layer %s as far as it can, for every "
                "sample alike, so it carries no information. Use association='similarity' (the default), or raise "
                "association_temperature.",
                layer,
            )
        return averages.terms

    def _record(self, terms: Mapping[str, tuple[float, Tensor]], features: Any) -> None:
        for name, (_, value) in terms.items():
            self._meter.add_term(name, value / self._window.processes)
        if features is not None and "attention" in features:
            self._meter.add_association(features["attention"])

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

    # ---- Saving and loading ------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self._distils:
            super()._save(output_dir, state_dict)
            return
        with self._plain_student():
            super()._save(output_dir, None if state_dict is None else without_calibration(state_dict))
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.args.should_save:
            # Trainer pickles its arguments, which only this library could read back: JSON says the same to anyone.
            (folder / PICKLED_ARGUMENTS).unlink(missing_ok=True)
            save_settings(self.args, folder, self.teacher)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._attached and self.feature_loss is not None:
            # What the last step observed belongs to this checkpoint, on every process.
            self.feature_loss.synchronize(self._sum_over_processes)
            if self.args.should_save:
                save_calibration(self.feature_loss, output_dir)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._distils or not self._reloads_here:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with self._plain_student():
            if isinstance(self.model, PreTrainedModel):
                reload_student(self.model, resume_from_checkpoint)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._attached and self.feature_loss is not None:
            load_calibration(self.feature_loss, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        with self._plain_student():
            if self._distils and self._reloads_here and isinstance(self.model, PreTrainedModel) and best is not None:
                reload_student(self.model, best)
            else:
                super()._load_best_model()

    @property
    def _reloads_here(self) -> bool:
        """Whether checkpoints hold whole tensors; FSDP and DeepSpeed carry the calibration in their own state."""
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)


class SemCKDTrainer(DistillationTrainer):
    """`transformers.Trainer` with SemCKD: every student layer learns from the teacher layers that see a sample alike.

    Args:
        teacher_model: The teacher: a model, or a name or folder to load it from.
        model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_loss_func,
            compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics: As in
            `DistillationTrainer`.

    Source: Chen et al. (AAAI 2021), Wang et al. (TKDE 2023); see `losses.SemCKDLoss`.
    """

    def __init__(
        self,
        model: ModelSource | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Tensor] | None = None,
        *,
        teacher_model: ModelSource | None = None,
    ):
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            teacher_model=teacher_model,
            feature_loss="semckd",
        )


def _as_config(args: TrainingArguments | None) -> SemCKDConfig:
    if args is None:
        return SemCKDConfig(output_dir="tmp_trainer")
    return args if isinstance(args, SemCKDConfig) else SemCKDConfig.from_training_arguments(args)


def _columns(dataset: Any) -> list[str]:
    return list(getattr(dataset, "column_names", None) or [])


def _parameters_outside_embeddings(student: nn.Module) -> int:
    count = getattr(student, "num_parameters", None)
    return 0 if count is None else int(count(exclude_embeddings=True))


def _wraps(wrapper: nn.Module, model: nn.Module) -> bool:
    return any(module is model for module in wrapper.modules())
