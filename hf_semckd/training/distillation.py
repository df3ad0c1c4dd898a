"""All that distilling adds to a training, built in one place for one student, its teachers and the layers found."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from ..config import SemCKDConfig
from ..data.batches import BatchCheck
from ..features.capture import remove_capturing_traces
from ..losses import FeatureLoss
from ..losses.ensemble import EnsembleLoss
from ..losses.logits import LogitMatch, LogitMixture
from ..losses.registry import make_feature_loss
from ..models.sizes import count_parameters
from ..teacher.cached import CachedTeacher
from ..teacher.outputs import TeacherDescription
from ..teacher.running import TeacherEnsemble, TeacherRunner
from .attachment import StudentAttachment, forget_preparation
from .attempts import Attempts
from .batches import check_label_range, check_of_batches
from .caching import TrainingData, check_cache, token_sampling
from .checks import check_lengths, check_published_batches, warn_of_single_samples
from .guard import FiniteGuard
from .inspection import Inspection, check_heads, check_loss_fits, inspect_pair
from .language import find_language_distillation, tried_batch
from .memory import CacheBytes, MemoryEstimate, TrainedBytes, feature_loss_bytes, teacher_bytes, try_step
from .monitor import Monitor
from .objective import Objective
from .optimizer import BorrowedOptimizer, add_feature_loss_groups
from .options import loss_options
from .pair import Pair
from .plan import Plan, Services
from .task_loss import TaskLoss
from .whole_weights import gathered

# Of the logit distillation, where the configuration leaves it open: of language models, and elsewhere.
LANGUAGE_TEMPERATURE, TEMPERATURE = 1.0, 4.0


class Distillation:
    """Owns the parts of a distillation, and joins the feature loss to the student for the time of training.

    Built by `Distillation.build`, and built anew where the student or the configuration changes (`model_init`,
    hyper-parameter search).

    Attributes:
        attachment: Joins losses and student; None where none is computed inside the student's forward.
        check_batch, check_evaluation: What every batch must be, in training and in evaluation (None: not known).
        settings: Those of the configuration, with what is used where they depend on the models.
        trial_batch: A few samples, to measure a step on: the longest one, where it is known.
        cache_bytes: What a teacher cache will take on disk; None without one, and for a stream.
    """

    def __init__(
        self,
        pair: Pair,
        plan: Plan,
        loss: FeatureLoss | None,
        args: SemCKDConfig,
        services: Services,
        check: BatchCheck,
    ):
        self.pair = pair
        self.plan = plan
        self.loss = loss
        self.check_batch = check
        self.check_evaluation: BatchCheck | None = None
        teacher = pair.teacher if plan.mixture is None else TeacherEnsemble(pair.teachers, plan.mixture)
        head = None if plan.language is None else plan.language.teacher_head
        self.run_teacher = TeacherRunner(
            teacher, loss, logits=plan.distills_logits, autocast=services.autocast, head=head
        )
        self.guard = FiniteGuard(services, self.run_teacher.check_finite, pair.student)
        self.monitor = Monitor(plan, pair, loss, services)
        task_loss = TaskLoss(plan, services)
        self.objective = Objective(plan, pair, loss, self.run_teacher, task_loss, self.guard, self.monitor, services)
        apart = loss is None and plan.language is None
        self.attachment = None if apart else StudentAttachment(pair.student, loss, pair.capture)
        self.attempts = Attempts(pair.student)
        self.trial_batch: Mapping[str, Any] | None = None
        self.cache_bytes: CacheBytes | None = None
        chosen = {} if loss is None else loss.settings
        used: dict[str, Any] = {"feature_weight": plan.feature_weight, "temperature": plan.temperature}
        if len(pair.teachers) > 1:
            used["teacher_weights"] = list(pair.weights)
        self.settings = {**args.distillation_settings(), **chosen, **used}
        self._borrowed: BorrowedOptimizer | None = None
        count = getattr(pair.student, "num_parameters", None)
        self._student_parameters = 0 if count is None else int(count(exclude_embeddings=True))

    @classmethod
    def build(
        cls,
        pair: Pair,
        batch: Mapping[str, Any],
        data: TrainingData | None,
        args: SemCKDConfig,
        services: Services,
        *,
        label_names: tuple[str, ...],
        vocabulary: int | None = None,
    ) -> Distillation:
        """Run a small training batch through both models, and make the parts for the layers that were found."""
        longest = None if data is None else data.longest_batch()
        if longest is not None:
            check_lengths(longest, pair.student, pair.teacher_models)
        try:
            logits, features = args.distills_logits, pair.source is not None
            batch = tried_batch(pair, batch)
            with gathered([pair.student]):
                found = inspect_pair(pair, batch, logits=logits, features=features, vocabulary=vocabulary)
                loss = None if pair.source is None else _make_loss(pair, found, data, args)
            plan = _make_plan(pair, found, loss, args, label_names)
            if found.student_logits is not None:
                size = found.student_logits.shape[-1]
                language = find_language_distillation(pair, plan, found.batch, size, args, services)
                plan = dataclasses.replace(plan, language=language)
            check = check_of_batches(pair, plan, found, services, trains=True)
            check_label_range(check, None if data is None else data.dataset)
            check(found.batch)
            warn_of_single_samples(loss, args)
            distillation = cls(pair, plan, loss, args, services, check)
            distillation.check_evaluation = check_of_batches(pair, plan, found, services, trains=False)
            distillation.trial_batch = batch if data is None or longest is None else data.prepare(longest)
            runners = zip(distillation.run_teacher.alone(), found.teachers, strict=True)
            draws = args.teacher_cache_samples
            sizes = [_open_cache(runner, found.batch, entry, data, plan, draws, services) for runner, entry in runners]
            distillation.cache_bytes = _cache_bytes(sizes, data)
            for teacher in pair.cached_teachers:
                if teacher.cache.sampling is not None:
                    distillation.settings["teacher_cache_samples"] = teacher.cache.sampling.draws
        finally:
            # Looking into a model leaves hooks of transformers on it, also where it is refused.
            remove_capturing_traces(pair.student)
            pair.remove_traces()
        return distillation

    @property
    def attached(self) -> bool:
        """Whether losses are computed inside the student's forward now."""
        return self.attachment is not None and self.attachment.attached

    def attach(self) -> None:
        """Begin a training: make the feature loss part of the student."""
        # What an earlier evaluation or training prepared is prepared anew.
        forget_preparation(self.pair.student)
        if self.loss is not None:
            self.loss.automatic_synchronization = False
        if self.attachment is not None:
            self.attachment.attach()

    def begin_attempt(self, batch_size: int | None, *, last: bool) -> None:
        """Begin a training, or begin it again with smaller batches; see `Attempts`."""
        if not last:
            self.attempts.begin(batch_size, speaks=self.objective.services.is_main)
        self.objective.statistics_ready = False
        self.guard.pending = None
        if self.loss is not None:
            self.loss.forget_collected()

    def memory(self, batch_size: int, args: SemCKDConfig, optimizer: Any) -> MemoryEstimate:
        """Return about what a training takes that is about to start; a small step is measured, with all in place.

        Not measured is a step for which a teacher would be loaded, cached, compiled or run by all processes.
        """
        pair, batch, step = self.pair, self.trial_batch, None
        reason = self._reason_not_to_try(args)
        if batch is not None and not reason:
            run = partial(self.objective.trial, pair.student)
            with nullcontext() if self.attachment is None else self.attachment.joined():
                step = try_step(pair.student, pair.teacher_models, batch, run, args.seed)
            if not self.attached:
                remove_capturing_traces(pair.student)
                pair.remove_traces()
        return MemoryEstimate(
            student=TrainedBytes.of(pair.student, self.loss, optimizer),
            projections=feature_loss_bytes(self.loss, optimizer),
            teacher=teacher_bytes(pair.teacher_models),
            step=step,
            batch_size=batch_size,
            accumulates=args.gradient_accumulation_steps > 1,
            cache=self.cache_bytes,
            unmeasured="" if step is not None else reason or "a step could not be tried",
        )

    def _reason_not_to_try(self, args: SemCKDConfig) -> str:
        """Say why no step can be tried before training; nothing where one can."""
        if self.trial_batch is None:
            return "no samples are known beforehand"
        if args.teacher_compile:
            return "the teacher is compiled"
        if not all(teacher.answers(self.trial_batch) for teacher in self.pair.cached_teachers):
            return "the teacher's outputs are not cached yet"
        if any(teacher.runs_together for teacher in self.pair.teachers):
            return "all processes run the teacher together"
        return ""

    def detach(self) -> None:
        """End a training: the student is the plain model again."""
        if self._borrowed is not None:
            self._borrowed.give_back()
            self._borrowed = None
        self.attempts.end()
        self.guard.pending = None
        self.pair.remove_traces()
        for teacher in self.pair.cached_teachers:
            teacher.flush()
        if self.loss is not None:
            self.loss.automatic_synchronization = True
        if self.attachment is not None and self.attachment.attached:
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

    def extend_optimizer(self, optimizer: Any, scheduler: Any, args: SemCKDConfig, *, borrowed: bool) -> None:
        """Append the feature loss's parameters to the optimizer; to one of the user's for the time of training."""
        assert self.loss is not None
        if not borrowed:
            rate = args.resolved_projection_learning_rate()
            add_feature_loss_groups(optimizer, self.loss, learning_rate=rate, weight_decay=args.weight_decay)
        elif self._borrowed is None:
            inner = getattr(optimizer, "optimizer", optimizer)
            self._borrowed = BorrowedOptimizer(inner, getattr(scheduler, "scheduler", scheduler), self.loss)

    def student_operations(self, inputs: Mapping[str, Any]) -> int:
        """Return the floating-point operations of a step on the student alone: nothing else stays."""
        name = getattr(self.pair.student, "main_input_name", "input_ids")
        return 6 * inputs[name].numel() * self._student_parameters if name in inputs else 0


def _open_cache(
    runner: TeacherRunner,
    batch: Any,
    described: TeacherDescription,
    data: TrainingData | None,
    plan: Plan,
    draws: int | None,
    services: Services,
) -> float | None:
    """Open a teacher's cache, if it has one, for the layers that were found, and refuse what cannot be cached.

    Returns the bytes that it takes for a sample, where that is known.
    """
    teacher = runner.teacher
    if not isinstance(teacher, CachedTeacher):
        return None
    # What is stored depends on the autocast under which the teacher ran, too.
    kept = f"{'' if runner.loss is None else runner.loss.kept} autocast {services.mixed_precision}"
    sampling = token_sampling(plan, described.logits, draws)
    distilled: dict[str, Any] = {"logits": runner.logits, "features": runner.loss is not None}
    teacher.open(batch, described, kept=kept, **distilled, sampling=sampling)
    size = None if data is None else check_cache(teacher, data, runner)
    if services.is_main:
        teacher.write_note(batch, described)
    return size


def _cache_bytes(sizes: Sequence[float | None], data: TrainingData | None) -> CacheBytes | None:
    known = [size for size in sizes if size is not None]
    if data is None or not known:
        return None
    samples = len(data.dataset) * getattr(data.dataset, "views", 1)
    return CacheBytes(sum(known), round(sum(known) * samples))


def _make_plan(
    pair: Pair, found: Inspection, loss: FeatureLoss | None, args: SemCKDConfig, label_names: tuple[str, ...]
) -> Plan:
    logits = found.student_logits
    weight = args.feature_weight
    if weight is None:
        weight = 0.0 if loss is None else loss.default_weight
    matches, temperature = found.matches or [LogitMatch()] * len(pair.teachers), _temperature(args, found)
    several = len(matches) > 1
    return Plan(
        task=found.task,
        shifts_labels=found.shifts_labels,
        # A mixture has put the classes into the student's order.
        match=LogitMatch(vocabulary=matches[0].vocabulary) if several else matches[0],
        mixture=LogitMixture(matches, pair.weights, temperature, found.task) if several else None,
        label_names=label_names,
        student_computes_loss=pair.router.takes_any(label_names),
        classes=logits.shape[1] if logits is not None and logits.dim() == 2 else None,
        temperature=temperature,
        task_weight=args.task_weight,
        logit_weight=args.logit_weight,
        feature_weight=weight,
        own_loss=found.own_loss,
    )


def _temperature(args: SemCKDConfig, found: Inspection) -> float:
    if args.temperature is not None:
        return args.temperature
    return LANGUAGE_TEMPERATURE if found.shifts_labels or found.writes_text else TEMPERATURE


def _make_loss(pair: Pair, found: Inspection, data: TrainingData | None, args: SemCKDConfig) -> FeatureLoss:
    """Return the feature loss for the layers that were found: one for each teacher, joined."""
    losses = []
    for described in found.teachers:
        # Each starts as if its teacher were the only one.
        with torch.random.fork_rng(devices=[], enabled=len(found.teachers) > 1):
            losses.append(_loss_of_teacher(pair, found, described, args))
    loss = losses[0] if len(losses) == 1 else EnsembleLoss(losses, pair.weights)
    if loss.reuses_teacher_head:
        check_heads(loss, pair, found)
    if loss.required_batch_size is not None and data is not None:
        check_published_batches(args, data.dataset)
    double = any(parameter.dtype is torch.float64 for parameter in pair.student.parameters())
    return loss.to(device=args.device, dtype=torch.float64 if double else torch.float32)


def _loss_of_teacher(pair: Pair, found: Inspection, described: TeacherDescription, args: SemCKDConfig) -> FeatureLoss:
    """Return the feature loss for one teacher; of one that was given, a copy."""
    if isinstance(pair.source, FeatureLoss):
        # The caller's object stays as it was given, and every run starts from it.
        loss = copy.deepcopy(pair.source)
        check_loss_fits(loss, found.student_features, described.features)
        return loss
    assert pair.source is not None
    return make_feature_loss(
        pair.source,
        found.student_specs,
        described.specs,
        loss_options(args),
        tokens_aligned=found.tokens_aligned,
        student_parameters=count_parameters(pair.student),
    )
