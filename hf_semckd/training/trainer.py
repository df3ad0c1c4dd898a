"""Trainers that distil: `transformers.Trainer` with a teacher, and nothing else changed."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from ..config import SemCKDConfig
from ..data.columns import CACHED, LABEL_COLUMNS, TEACHER_PREFIX
from ..data.random_state import preserved_random_state
from ..data.samples import collate, column_names, first_samples
from ..features.capture import FeatureCapture, remove_capturing_traces
from ..losses import FeatureLoss
from ..losses.registry import find_layers, make_feature_loss, names_layers, reuses_teacher_head
from ..models.inputs import InputSelector, forward_parameters
from ..models.loading import empty_model, load_model
from ..models.tasks import Task, task_of
from ..teacher.teacher import Teacher
from .attachment import StudentAttachment, forget_preparation
from .caching import CacheCallback, CachingTrainer
from .callbacks import AssociationCallback
from .checkpoint import CheckpointingTrainer
from .checks import (
    check_dataset,
    check_encoder_decoder,
    check_feature_loss,
    check_label_names,
    check_labels,
    check_models,
    check_parallelizm,
    check_published_batches,
    check_teacher_given,
)
from .counts import StepCounts
from .inspection import Inspection, check_heads, check_loss_fits, inspect_pair
from .monitor import ObservingTrainer
from .objective import ObjectiveTrainer
from .optimizer import BorrowedOptimizer, add_feature_loss_groups
from .options import loss_options
from .publishing_hooks import PublishingTrainer

logger = logging.getLogger(__name__)

ModelSource = nn.Module | str | os.PathLike[str]


class DistillationTrainer(ObjectiveTrainer, CachingTrainer, ObservingTrainer, CheckpointingTrainer, PublishingTrainer):
    """`transformers.Trainer` that also learns from a frozen teacher.

    total loss = task_weight * task + logit_weight * logits + feature_weight * features, each averaged over the
    samples (or labeled tokens) of the whole optimizer step, however it is cut into micro-batches and processes.
    With both distillation weights 0 this is `Trainer`, bit for bit.

    Args:
        model: The student: a model, or a name or folder to load it from.
        args: A `SemCKDConfig`; plain `TrainingArguments` get the distillation's defaults.
        teacher_model: The teacher, likewise. It is frozen and put into evaluation mode, and keeps its precision,
            unless `args.teacher_dtype` names another: a copy teaches then.
        feature_loss: `None` or `"kd"` (logits only), the name of a method (see `losses.FEATURE_LOSSES`), several
            joined by "+" (`"semckd+crd"`), or a `FeatureLoss` made for the layers that are chosen, of which a copy is
            trained: `trainer.feature_loss`.
        data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_loss_func, compute_metrics,
            callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics: As in `Trainer`. An
            optimizer that is passed in holds the projections as one more group for the time of training.

    Raises:
        InputError: When models and data do not fit together; always before the first step.
        ConfigurationError: When the arguments cannot work.
    """

    default_feature_loss: ClassVar[str | None] = None
    label_names: list[str]
    _signature_columns: list[str] | None

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
        self._feature_loss_source = check_feature_loss(feature_loss or self.default_feature_loss)
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
        self._probe: Inspection | None = None
        self._task: Task = "single_label"
        self._counts = StepCounts()
        self.start_averages(0)
        self._statistics_ready = False
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
        """The frozen teacher in evaluation mode, or None without distillation; loaded now if it was not needed yet."""
        if self._teacher is None:
            return None
        self._teacher.materialize()
        return self._teacher.model

    @property
    def _teacher_model(self) -> nn.Module | None:
        """The teacher as it is, loaded or not: its configuration is there in any case."""
        return None if self._teacher is None else self._teacher.model

    @property
    def student_layer_names(self) -> list[str]:
        """Names of the student layers that are looked at: hidden-state indices or module names.

        Between CNNs SemCKD leaves the last one to the logits (`feature_loss.compared` tells how many learn).
        """
        return self._student_capture.names() if self._distils_features else []

    @property
    def teacher_layer_names(self) -> list[str]:
        """Names of the teacher layers that are learned from."""
        return self._teacher.capture.names() if self._teacher is not None and self._distils_features else []

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
        check_parallelizm(self.args)
        # The terms are scaled here for accumulation and processes; Trainer must not do it again.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = False
        self._teacher = self._make_teacher(teacher_model)
        teacher = self._teacher.model
        check_label_names(self.student, teacher)
        check_encoder_decoder((self.student, teacher), self.args)
        self._teacher.to(self.args.device)
        layers = self._chosen_layers(self.student, "student")
        self._student_capture = FeatureCapture(self.student, layers, "student")
        self._select_for_student = InputSelector(self.student)
        self._student_takes = set(self._select_for_student.parameters)
        self._teacher_only = set(forward_parameters(teacher)) - self._student_takes - set(LABEL_COLUMNS)
        self.callback_handler.callbacks[:0] = [AssociationCallback(self), CacheCallback(self)]
        if self.train_dataset is not None:
            with preserved_random_state(self.args.seed):
                check_dataset(self.train_dataset, (self.student, teacher), self.args.remove_unused_columns)
            self._build()

    def _make_teacher(self, source: Any) -> Teacher:
        """Load the teacher, unless it was cached before and may stay where it is."""
        args = self.args

        def load() -> nn.Module:
            return load_model(source, "teacher", like=self.student, dtype=args.resolved_teacher_dtype())

        # A loss that is given as an object is tried on the teacher's features.
        # Nor may one whose classifier the student is to have.
        wanted = isinstance(self._feature_loss_source, FeatureLoss) or reuses_teacher_head(self._feature_loss_source)
        unloaded = not wanted and self._may_stay_unloaded(source)
        model = empty_model(source, like=self.student) if unloaded else load()
        # Before it is frozen, and with it whatever it shares.
        check_models(self.student, model)
        layers = self._chosen_layers(model, "teacher")
        return Teacher(model, layers, compiled=args.teacher_compile, load=load if unloaded else None)

    @property
    def _chooses_layers(self) -> str | None:
        """The name of a method that names its own layers, where the user chose none; None for all others."""
        source = self._feature_loss_source
        if self.args.teacher_layers is not None or not self._distils_features or not isinstance(source, str):
            return None
        return source if names_layers(source) else None

    def _chosen_layers(self, model: nn.Module, role: str) -> Any:
        """Return the layers that the user chose, or else those that the feature loss asks for; None for all blocks."""
        given = self.args.student_layers if role == "student" else self.args.teacher_layers
        source = self._feature_loss_source
        if given is not None or not self._distils_features or source is None:
            return given
        return find_layers(source, model, role)

    def _build(self) -> None:
        """Inspection both models with a small batch and make the feature loss for the layers that were found."""
        assert self._teacher is not None
        try:
            with preserved_random_state(self.args.seed):
                batch = self._prepare_input(self._probe_batch())
                self._settle_teacher(batch)
                self._probe = self._probe_models(batch)
                if self._distils_features:
                    self.feature_loss = self._make_feature_loss(self._probe, batch)
            self._open_teacher_cache(self._teacher.inputs(batch))
        finally:
            # Looking into a model leaves hooks of transformers on it, also where it is refused.
            remove_capturing_traces(self.student)
            self._teacher.remove_traces()

    def _probe_models(self, batch: Mapping[str, Any]) -> Inspection:
        assert self._teacher is not None
        check_labels(batch, self.label_names, self.args)
        self.label_names = self.label_names or [name for name in ("labels",) if name in batch]
        found = inspect_pair(
            self.student,
            self._student_capture,
            self._teacher,
            batch,
            features=self._distils_features,
            logits=self.args.distils_logits,
        )
        if found.student_logits is not None:
            problem = getattr(getattr(self.student, "config", None), "problem_type", None)
            self._task = task_of(found.student_logits, batch.get("labels"), problem)
        return found

    def _make_feature_loss(self, found: Inspection, batch: Mapping[str, Any]) -> FeatureLoss:
        loss = self._feature_loss_source
        if isinstance(loss, str):
            loss = make_feature_loss(
                loss,
                found.student_specs,
                found.teacher_specs,
                loss_options(self.args),
                tokens_aligned=found.tokens_aligned,
                student_parameters=sum(entry.numel() for entry in self.student.parameters()),
            )
        assert isinstance(loss, FeatureLoss)
        if loss is self._feature_loss_source:
            # The caller's object stays as it was given, and every run starts from it.
            loss = copy.deepcopy(loss)
            check_loss_fits(loss, found)
        if loss.reuses_teacher_head:
            assert self._teacher is not None
            check_heads(loss, self.student, self._teacher, batch, found)
        if loss.required_batch_size is not None:
            size = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
            check_published_batches(self.args, size, self.args.world_size)
        dtype = next((p.dtype for p in self.student.parameters() if p.dtype is torch.float64), torch.float32)
        return loss.to(device=self.args.device, dtype=dtype)

    def _probe_batch(self) -> Mapping[str, Any]:
        """Return a small training batch as the student will see it."""
        if self.train_dataset is None:
            return next(iter(self.get_train_dataloader()))
        dataset, collator = self._dataset_and_collator()
        return collate(collator, first_samples(dataset))

    def _dataset_and_collator(self) -> tuple[Any, Any]:
        """Return the training samples and the collator as a training data loader has them."""
        dataset, collator = self.train_dataset, self.data_collator
        if hasattr(dataset, "remove_columns") and hasattr(dataset, "column_names") and dataset.column_names:
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="training")
        return dataset, collator

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
            result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            if not self.args.load_best_model_at_end:
                self._finish_student()
            return result
        finally:
            self._detach()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict with the student as it will be; see `Trainer.evaluation_loop`."""
        undo = self._finish_student()
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            undo()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        undo = self._finish_student()
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            undo()

    def _finish_student(self) -> Callable[[], None]:
        """Put into the plain student what it needs of the feature loss, while that is training; return an undo."""
        loss = self.feature_loss
        if loss is not None and loss.reuses_teacher_head and self._attached:
            return loss.finish(self.student, self.teacher)
        return lambda: None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a new student, with a fresh feature loss when training has begun."""
        model = super().call_model_init(trial)
        if self._attachment is not None and self.is_in_train:
            self._attachment.detach()
            self.model = model
            self._build()
            self._attach()
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        """Take a trial's values, check them, and make the feature loss that they ask for."""
        super()._hp_search_setup(trial)
        if trial is None or not self._distils:
            return
        self.args.validate_distillation()
        check_teacher_given(self._teacher, self.args)
        if self._attachment is not None:
            self._attachment.detach()
        self._build()
        self._attach()

    def _attach(self) -> None:
        if self._distils:
            # What an earlier evaluation or training prepared is prepared anew.
            forget_preparation(self.student)
            self._forget_wrappers()
        loss = self.feature_loss
        if loss is None or not self._distils_features:
            return
        current = self._attachment
        if current is None or current.student is not self.student or current.loss is not loss:
            current = self._attachment = StudentAttachment(self.student, loss, self._student_capture)
        self._student_parameters = _parameters_outside_embeddings(self.student)
        self._statistics_ready = False
        loss.automatic_synchronization = False
        current.attach()

    def _detach(self) -> None:
        if self._borrowed is not None:
            self._borrowed.give_back()
            self._borrowed = None
        if self.feature_loss is not None:
            self.feature_loss.automatic_synchronization = True
        if self._teacher is not None:
            self._teacher.remove_traces()
            if self._teacher.cache is not None:
                self._teacher.cache.store.flush()
        if self._attachment is None or not self._attachment.removable:
            return
        self._attachment.detach()
        remove_capturing_traces(self.student)
        self._forget_wrappers()

    def _forget_wrappers(self) -> None:
        """Drop wrappers made for the student in another state; the next training wraps it again."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
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
            rate = self.args.resolved_projection_learning_rate()
            add_feature_loss_groups(
                self.optimizer, self.feature_loss, learning_rate=rate, weight_decay=self.args.weight_decay
            )
        elif self._borrowed is None:
            inner: Any = getattr(self.optimizer, "optimizer", self.optimizer)
            scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
            self._borrowed = BorrowedOptimizer(inner, scheduler, self.feature_loss)
        return optimizer

    def _set_signature_columns_if_needed(self) -> None:
        """Keep what the teacher takes besides what the student takes; `_prepare_inputs` tells them apart."""
        first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if first and self._teacher is not None and self._signature_columns is not None:
            extra = [name for name in forward_parameters(self._teacher.model) if name not in self._signature_columns]
            columns = column_names(self.train_dataset)
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
        own = {
            key: value
            for key, value in inputs.items()
            if key not in self._teacher_only and key != CACHED and not key.startswith(TEACHER_PREFIX)
        }
        if isinstance(self.student, PreTrainedModel) or hasattr(self.student, "get_base_model"):
            return own
        # A plain module's one input may have any name, also one that the teacher alone knows.
        labels = {key: value for key, value in inputs.items() if key in LABEL_COLUMNS}
        return {**self._select_for_student(inputs), **labels}


class SemCKDTrainer(DistillationTrainer):
    """`transformers.Trainer` with SemCKD: every student layer learns from the teacher layers that see a sample alike.

    Takes what `DistillationTrainer` takes; `feature_loss` is SemCKD unless another one is given.

    Source: Chen et al. (AAAI 2021), Wang et al. (TKDE 2023); see `losses.SemCKDLoss`.
    """

    default_feature_loss = "semckd"


def _as_config(args: TrainingArguments | None) -> SemCKDConfig:
    if args is None:
        return SemCKDConfig(output_dir="tmp_trainer")
    return args if isinstance(args, SemCKDConfig) else SemCKDConfig.from_training_arguments(args)


def _parameters_outside_embeddings(student: nn.Module) -> int:
    count = getattr(student, "num_parameters", None)
    return 0 if count is None else int(count(exclude_embeddings=True))


def _wraps(wrapper: nn.Module, model: nn.Module) -> bool:
    return any(module is model for module in wrapper.modules())
