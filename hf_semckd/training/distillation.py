"""All that distilling adds to a training, built in one place for one student, one teacher and the layers found."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import SemCKDConfig
from ..features.capture import remove_capturing_traces
from ..losses import FeatureLoss
from ..losses.registry import LossSource, make_feature_loss
from ..models.tasks import shifts_labels, task_of
from ..teacher.cached import CachedTeacher
from ..teacher.runner import TeacherRunner
from .attachment import StudentAttachment, forget_preparation
from .caching import TrainingData, check_cache
from .checks import check_published_batches
from .guard import FiniteGuard
from .inspection import Inspection, check_heads, check_loss_fits, inspect_pair
from .monitor import Monitor
from .objective import Objective
from .optimizer import BorrowedOptimizer, add_feature_loss_groups
from .options import loss_options
from .pair import Pair
from .plan import Plan
from .services import Services
from .task_loss import TaskLoss


@dataclass(frozen=True)
class UserFunctions:
    """What the user's `Trainer` arguments say of the task loss.

    Attributes:
        label_names: Columns of a batch that hold labels.
        loss: `compute_loss_func`, or None.
        smoother: `Trainer`'s label smoother, or None.
    """

    label_names: tuple[str, ...]
    loss: Callable[..., Tensor] | None = None
    smoother: Callable[..., Tensor] | None = None


class Distillation:
    """Owns the parts of a distillation, and joins the feature loss to the student for the time of training.

    Built by `Distillation.build`, and built anew where the student or the configuration changes (`model_init`,
    hyper-parameter search).

    Attributes:
        pair: Student and teacher.
        plan: What was decided.
        loss: The feature loss, or None for logits alone.
        run_teacher: Runs the teacher on a batch.
        objective: Computes what is minimized.
        guard: Ends the training when a loss is not finite.
        monitor: Averages what is logged.
        attachment: Joins loss and student; None without a feature loss.
        settings: What is used of the settings that depend on the models.
    """

    def __init__(
        self,
        pair: Pair,
        plan: Plan,
        loss: FeatureLoss | None,
        args: SemCKDConfig,
        services: Services,
        user: UserFunctions,
    ):
        self.pair = pair
        self.plan = plan
        self.loss = loss
        self.run_teacher = TeacherRunner(pair.teacher, loss, logits=plan.distils_logits, autocast=services.autocast)
        self.guard = FiniteGuard(services, self.run_teacher.check_finite)
        layers = pair.student_layer_names, pair.teacher_layer_names
        self.monitor = Monitor(plan, loss, services, *layers, custom_loss=user.loss is not None)
        self.objective = Objective(
            plan,
            pair.student,
            loss,
            self.run_teacher,
            pair.router,
            TaskLoss(plan, user.loss, user.smoother, services.device),
            self.guard,
            self.monitor,
            services,
        )
        self.attachment = None if loss is None else StudentAttachment(pair.student, loss, pair.capture)
        self.settings = {
            **args.distillation_settings(),
            **({} if loss is None else loss.settings),
            "feature_weight": plan.feature_weight,
        }
        self._borrowed: BorrowedOptimizer | None = None
        self._student_parameters = 0

    @classmethod
    def build(
        cls,
        pair: Pair,
        batch: Mapping[str, Any],
        data: TrainingData | None,
        args: SemCKDConfig,
        services: Services,
        user: UserFunctions,
        prepare: Callable[[Any], Any],
    ) -> Distillation:
        """Run a small batch through both models, and make the parts for the layers that were found.

        Args:
            pair: Student and teacher.
            batch: A small training batch, on the device.
            data: The training samples, where they can be read ahead of training.
            args: The configuration.
            services: The engine.
            user: The user's part of the task loss.
            prepare: Moves a batch to the device.

        Raises:
            InputError: When models, loss and data do not fit together.
            ConfigurationError: When a method cannot be used for these layers.
        """
        try:
            found = inspect_pair(pair, batch, logits=args.distils_logits, features=pair.source is not None)
            loss = None if pair.source is None else _make_loss(pair.source, pair, found, batch, data, args, services)
            distillation = cls(pair, _make_plan(pair, found, loss, batch, args, user), loss, args, services, user)
            if pair.cached_teacher is not None:
                distillation._open_cache(pair.cached_teacher, found, batch, data, services, prepare)
        finally:
            # Looking into a model leaves hooks of transformers on it, also where it is refused.
            remove_capturing_traces(pair.student)
            pair.teacher.remove_traces()
        return distillation

    def _open_cache(
        self,
        teacher: CachedTeacher,
        found: Inspection,
        batch: Mapping[str, Any],
        data: TrainingData | None,
        services: Services,
        prepare: Callable[[Any], Any],
    ) -> None:
        """Open the cache for the layers that were found, and refuse what cannot be cached."""
        # What is stored depends on the autocast under which the teacher ran, too.
        kept = f"{'' if self.loss is None else self.loss.kept} autocast {services.mixed_precision}"
        logits, features = self.plan.distils_logits, self.plan.distils_features
        teacher.open(batch, found.teacher, kept=kept, logits=logits, features=features)
        if data is not None:
            check_cache(teacher, data, self.run_teacher, prepare)
        if services.is_main:
            teacher.write_note(batch, found.teacher)

    # ---- Training ----------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Whether the feature loss is part of the student now."""
        return self.attachment is not None and self.attachment.attached

    def attach(self) -> None:
        """Begin a training: make the feature loss part of the student."""
        # What an earlier evaluation or training prepared is prepared anew.
        forget_preparation(self.pair.student)
        self.objective.start()
        if self.attachment is None or self.loss is None:
            return
        count = getattr(self.pair.student, "num_parameters", None)
        self._student_parameters = 0 if count is None else int(count(exclude_embeddings=True))
        self.loss.automatic_synchronization = False
        self.attachment.attach()

    def detach(self) -> None:
        """End a training: the student is the plain model again."""
        if self._borrowed is not None:
            self._borrowed.give_back()
            self._borrowed = None
        if self.loss is not None:
            self.loss.automatic_synchronization = True
        self.guard.reset()
        self.pair.teacher.remove_traces()
        if self.pair.cached_teacher is not None:
            self.pair.cached_teacher.flush()
        if self.attachment is not None and self.attachment.removable:
            self.attachment.detach()
            remove_capturing_traces(self.pair.student)

    def plain_student(self) -> AbstractContextManager[None]:
        """Return a context in which the student is the plain model: to save, reload or count it."""
        return nullcontext() if self.attachment is None else self.attachment.suspended()

    def finish_student(self) -> Callable[[], None]:
        """Put into the plain student what it needs of the feature loss, while that is training; return an undo."""
        if self.loss is not None and self.loss.reuses_teacher_head and self.attached:
            return self.loss.finish(self.pair.student, self.pair.teacher.model)
        return lambda: None

    def add_to_optimizer(self, optimizer: Any, args: SemCKDConfig) -> None:
        """Append the feature loss's parameters to the student's own optimizer."""
        assert self.loss is not None
        rate = args.resolved_projection_learning_rate()
        add_feature_loss_groups(optimizer, self.loss, learning_rate=rate, weight_decay=args.weight_decay)

    def borrow_optimizer(self, optimizer: Any, scheduler: Any) -> None:
        """Append the feature loss's parameters to a user's optimizer, for the time of training."""
        if self._borrowed is None:
            assert self.loss is not None
            inner = getattr(optimizer, "optimizer", optimizer)
            self._borrowed = BorrowedOptimizer(inner, getattr(scheduler, "scheduler", scheduler), self.loss)

    def student_operations(self, inputs: Mapping[str, Any]) -> int:
        """Return the floating-point operations of a step on the student alone: nothing else stays."""
        name = getattr(self.pair.student, "main_input_name", "input_ids")
        return 6 * inputs[name].numel() * self._student_parameters if name in inputs else 0


def _make_plan(
    pair: Pair,
    found: Inspection,
    loss: FeatureLoss | None,
    batch: Mapping[str, Any],
    args: SemCKDConfig,
    user: UserFunctions,
) -> Plan:
    student, logits = pair.student, found.student_logits
    problem = getattr(getattr(student, "config", None), "problem_type", None)
    weight = args.feature_weight
    if weight is None:
        weight = 0.0 if loss is None else loss.default_weight
    return Plan(
        task="single_label" if logits is None else task_of(logits, batch.get("labels"), problem),
        shifts_labels=shifts_labels(student),
        label_names=user.label_names,
        student_computes_loss=any(pair.router.student_takes(name) for name in (*user.label_names, "labels")),
        classes=logits.shape[1] if logits is not None and logits.dim() == 2 else None,
        temperature=args.temperature,
        task_weight=args.task_weight,
        logit_weight=args.logit_weight,
        feature_weight=weight,
        distils_features=loss is not None,
    )


def _make_loss(
    source: LossSource,
    pair: Pair,
    found: Inspection,
    batch: Mapping[str, Any],
    data: TrainingData | None,
    args: SemCKDConfig,
    services: Services,
) -> FeatureLoss:
    """Return the feature loss for the layers that were found; of one that was given, a copy."""
    student = pair.student
    if isinstance(source, FeatureLoss):
        # The caller's object stays as it was given, and every run starts from it.
        loss = copy.deepcopy(source)
        check_loss_fits(loss, found)
    else:
        loss = make_feature_loss(
            source,
            found.student_specs,
            found.teacher.specs,
            loss_options(args),
            tokens_aligned=found.tokens_aligned,
            student_parameters=sum(entry.numel() for entry in student.parameters()),
        )
    if loss.reuses_teacher_head:
        check_heads(loss, pair, batch, found)
    if loss.required_batch_size is not None:
        dataset: Any = None if data is None else data.dataset
        size = len(dataset) if hasattr(dataset, "__len__") else None
        check_published_batches(args, size, args.world_size)
    dtype = next((p.dtype for p in student.parameters() if p.dtype is torch.float64), torch.float32)
    return loss.to(device=services.device, dtype=dtype)
