"""Trainers that distill: `transformers.Trainer` with a teacher. The hooks are here, and what they do is elsewhere."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..config import SemCKDConfig
from ..data.views import all_versions, preserved_random_state
from ..losses.registry import LossSource
from ..models.loading import ModelSource, TeacherSource, load_model, teacher_list
from .arriving import StopRequest
from .attachment import forget_wrappers
from .batches import checked_batches, checked_collator
from .caching import TrainingData, check_filled, fill_cache, require_cache
from .callbacks import install_callback
from .checks import check_dataset, check_feature_loss, check_labels, check_output_folder, check_teacher_given
from .classes import vocabulary_size
from .distillation import Distillation
from .engines import Engine, check_engine, check_parallelism, leave_gpus_to_teacher
from .interrupts import saved_when_terminated
from .pair import Pair
from .plan import Services
from .processes import noticing_lost_processes, noting_step
from .publishing_trainer import PublishingTrainer
from .sealing import checkpoint_to_resume, resealing
from .streams import batches_to_read, check_equal_sizes, check_position
from .task_loss import plain_module_loss


class DistillationTrainer(PublishingTrainer):
    """`transformers.Trainer` that also learns from a frozen teacher.

    total loss = task_weight * task + logit_weight * logits + feature_weight * features, each averaged over the
    samples (or labeled tokens) of the whole optimizer step, however it is cut into micro-batches and processes.
    With both distillation weights 0 this is `Trainer`, bit for bit.

    Args:
        model: The student: a model, or a name or folder to load it from.
        args: A `SemCKDConfig`; plain `TrainingArguments` get the distillation's defaults.
        teacher_model: The teacher, likewise, or a list of several (see `args.teacher_weights`). It is frozen and put
            into evaluation mode, and keeps its precision, unless `args.teacher_dtype` names another: a copy teaches
            then.
        feature_loss: `None` or `"kd"` (logits only), the name of a method (see `losses.FEATURE_LOSSES`), several
            joined by "+" (`"semckd+crd"`), a class of `FeatureLoss`, made for the layers that are found, or an object
            made for the layers that are chosen, of which a copy is trained: `trainer.feature_loss`.
        data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_loss_func, compute_metrics,
            callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics: As in `Trainer`. An
            optimizer that is passed in holds the projections as one more group for the time of training.

    Raises:
        InputError: When models and data do not fit together; always before the first step.
        ConfigurationError: When the arguments cannot work.
    """

    default_feature_loss: ClassVar[str | None] = None
    data_collator: Any
    label_names: list[str]

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
        teacher_model: TeacherSource | None = None,
        feature_loss: LossSource | None = None,
    ):
        # Trainer's constructor calls overridden methods: what they read must exist before it runs.
        self.pair: Pair | None = None
        self.distillation: Distillation | None = None
        self._source = check_feature_loss(feature_loss or self.default_feature_loss)
        self._stop = StopRequest()
        args = SemCKDConfig.of(args)
        check_output_folder(args)
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
        if self._distills:
            self._open_pair(teacher_model)

    def fill_teacher_cache(self) -> int:
        """Run the teacher on every training sample that the cache lacks, and return how many samples it holds.

        Under Accelerate every process takes its share; a stream is read as far as `max_steps` will read it. Training
        with the same settings then never runs the teacher.

        Raises:
            ConfigurationError: Without `teacher_cache_dir`.
            InputError: When the cache would not fit, or samples change whenever they are read.
        """
        teachers = require_cache(self.pair, self.args)
        run_teacher = self._built().run_teacher
        quiet = self.args.disable_tqdm or not self.is_local_process_zero()
        with preserved_random_state(self.args.seed):
            with checked_batches(self, self._built().check_batch, teachers, drop_last=False):
                # Not an evaluation's loader, which Trainer may keep.
                loader = self.get_test_dataloader(all_versions(self.train_dataset))
            limit = batches_to_read(self.train_dataset, self.args)
            fill_cache(teachers, run_teacher, loader, self._prepare_input, quiet, limit)
        self.accelerator.wait_for_everyone()
        return min(map(check_filled, teachers))

    # ---- Setting up --------------------------------------------------------------------------------------------

    @property
    def _distills(self) -> bool:
        return self.args.distills_logits or self._feature_source is not None

    @property
    def _feature_source(self) -> LossSource | None:
        return self._source if self.args.distills_features else None

    def _open_pair(self, teacher_model: TeacherSource | None) -> None:
        check_teacher_given(teacher_model, self.args)
        assert teacher_model is not None
        leave_gpus_to_teacher(self.args, teacher_list(teacher_model))
        check_parallelism(self.accelerator, self.args)
        # The terms are scaled for accumulation and processes; Trainer must not do it again.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = False
        self.pair = Pair.open(self.student, teacher_model, self.args, self._feature_source, self.accelerator)
        if self.train_dataset is not None:
            with preserved_random_state(self.args.seed):
                models = (self.student, *self.pair.teacher_models)
                check_dataset(self.train_dataset, models, self.args.remove_unused_columns)
            self._build()

    def _built(self) -> Distillation:
        """Return the distillation for the present student."""
        found = self.distillation
        return found if found is not None and found.pair.student is self.student else self._build()

    def _build(self) -> Distillation:
        assert self.pair is not None
        if self.distillation is not None or self.pair.student is not self.student:
            files = self.pair.teachers, self.pair.files
            self.pair = Pair.of(self.student, *files, self.args, self._feature_source)
        with preserved_random_state(self.args.seed):
            data = self._training_data()
            batch = data.first_batch() if data else self._prepare_input(next(iter(self.get_train_dataloader())))
            check_labels(batch, self.label_names, self.args)
            check_equal_sizes(data, self.args)
            if self.distillation is None:
                self.pair.prepare_inputs(self.processing_class, batch)
            if not self.label_names and "labels" in batch:
                self.label_names = ["labels"]
            services = Services.of(
                self.accelerator, self.args.device, self.compute_loss_func, self.label_smoother, self._stop
            )
            self.distillation = Distillation.build(
                self.pair,
                batch,
                data,
                self.args,
                services,
                label_names=tuple(self.label_names),
                vocabulary=vocabulary_size(self.processing_class),
            )
        install_callback(self.callback_handler, self.distillation)
        return self.distillation

    def _training_data(self) -> TrainingData | None:
        """Return the training samples and the collator as a training data loader has them."""
        dataset, collator = self.train_dataset, self.data_collator
        if dataset is None:
            return None
        if hasattr(dataset, "remove_columns") and getattr(dataset, "column_names", None):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="training")
        columns = frozenset() if self.pair is None else self.pair.router.columns_to_learn_from(self.args.task_weight)
        return TrainingData(dataset, collator, self._prepare_input, columns)

    # ---- Trainer's hooks ---------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return `Trainer`'s, whose batches are checked and bring along what the teacher caches hold of them."""
        # The caches are open when the distillation is built.
        if self.distillation is None:
            return super().get_train_dataloader()
        with checked_batches(self, self.distillation.check_batch, self.distillation.pair.cached_teachers):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return `Trainer`'s, whose batches are checked too: what fails there would end a training in the middle."""
        with checked_collator(self, None if self.distillation is None else self.distillation.check_evaluation):
            return super().get_eval_dataloader(eval_dataset)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Fetch an optimizer step's micro-batches, each with the counts that its terms are averaged over."""
        if self.pair is not None:
            # Our loss needs no count; that of a subclass may.
            self.model_accepts_loss_kwargs = type(self).compute_loss is not DistillationTrainer.compute_loss
        with noting_step(self.state.global_step + 1):
            batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.pair is not None:
            self.model_accepts_loss_kwargs = False
        if self.distillation is not None and batches:
            batches = self.distillation.objective.begin_step(batches, self._prepare_input)
        return batches, items

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """Train the student; see `Trainer.train`. The student is the plain model again afterwards, whatever happens.

        Raises:
            NonFiniteLossError: When a loss term becomes NaN or infinite; the last checkpoint is intact.
            TeacherOutputError: When it is the teacher's doing.
            CheckpointError: When there is no whole checkpoint to resume from.
            SaveError, LostProcessError: When a checkpoint cannot be written, and when another process has failed.
        """
        resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        check_engine(resume_from_checkpoint, Engine.of(self.accelerator))
        check_position(resume_from_checkpoint, self.train_dataset, self.args)
        check_output_folder(self.args, probe=True)
        stop = self._stop if self._distills else None
        with noticing_lost_processes(self.args.world_size), resealing(self), saved_when_terminated(self, stop):
            if self.pair is None:
                return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            # A search may have taken the last trial's student away; this one's is made by `model_init`, in training.
            if self._distills and self.model is not None:
                self._attach(self._built())
            try:
                result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
                # A trial may have turned the distillation off.
                if self.distillation is not None:
                    self.distillation.guard.check_pending(self.state.global_step)
                    # The best checkpoint, where it was loaded, holds a finished student.
                    if not self.args.load_best_model_at_end or self.state.best_model_checkpoint is None:
                        self.distillation.finish_student()
                return result
            finally:
                self._detach()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the distillation loss while training, and what `Trainer` returns otherwise."""
        if self.distillation is not None and self.model.training and self.is_in_train:
            result = self.distillation.objective(model, inputs, self.state.global_step + 1, return_outputs)
            return result if hasattr(Trainer, "loss_is_scaled_for_ga") else self._unscaled(result, return_outputs)
        plain, lacks_loss = None, self.pair is not None and not self.pair.router.takes_any(self.label_names)
        if lacks_loss and self.compute_loss_func is None:
            plain = plain_module_loss(model, inputs, self.label_names, return_outputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch) if plain is None else plain

    def _unscaled(self, result: Any, return_outputs: bool) -> Any:
        """Undo what `Trainer` does to a loss before transformers 5.2x: another division by the accumulation steps."""
        factor = 1 if self.compute_loss_func is not None else self.current_gradient_accumulation_steps
        return (result[0] * factor, result[1]) if return_outputs else result * factor

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a new student, with a fresh feature loss when training has begun."""
        model = super().call_model_init(trial)
        if self.pair is not None and self.is_in_train and self._distills:
            self._detach()
            self.model = model
            self._attach(self._build())
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        """Take a trial's values, check them, and make the feature loss that they ask for."""
        super()._hp_search_setup(trial)
        if trial is None:
            return
        self._detach()
        if self._distills:
            self.args.validate_distillation()
            check_teacher_given(self.pair, self.args)
            self._attach(self._build())
        else:
            self.distillation = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the student's optimizer as `Trainer` does, and append the feature loss's parameters."""
        distillation = self.distillation
        if distillation is None or distillation.loss is None or not distillation.attached:
            return super().create_optimizer(*args, **kwargs)
        with distillation.plain_student():
            optimizer = super().create_optimizer(*args, **kwargs)
        distillation.extend_optimizer(self.optimizer, self.lr_scheduler, self.args, borrowed=not self._owns_optimizer)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what `Trainer` logs, with the terms of the window and the association's entropy beside the loss."""
        distillation = self.distillation
        if distillation is None or "loss" not in logs:
            super().log(logs, start_time)
            return
        if self.is_in_train:
            distillation.guard.check_pending(self.state.global_step)
        terms = distillation.monitor.finish(self.state.global_step)
        super().log({**logs, **terms}, start_time)
        # Kept in the history, not printed: S * T numbers would bury the others.
        self.state.log_history[-1].update(distillation.monitor.history_entries())

    def _attach(self, distillation: Distillation) -> None:
        distillation.attach()
        self._forget_wrappers()

    def _detach(self) -> None:
        if self.distillation is not None:
            self.distillation.detach()
            self.callback_handler.model = self.model
            if not self.distillation.attached:
                self._forget_wrappers()

    def _forget_wrappers(self) -> None:
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.model_wrapped = self.model
            forget_wrappers(self.accelerator, self.model)


class SemCKDTrainer(DistillationTrainer):
    """`transformers.Trainer` with SemCKD: every student layer learns from the teacher layers that see a sample alike.

    Takes what `DistillationTrainer` takes; `feature_loss` is SemCKD unless another one is given.

    Source: Chen et al. (AAAI 2021), Wang et al. (TKDE 2023); see `losses.SemCKDLoss`.
    """

    default_feature_loss = "semckd"
