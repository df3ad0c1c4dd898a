"""What is minimized in a step: the task, logit and feature terms, exact over micro-batches and processes."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import SemCKDError
from ..losses import FeatureLoss
from ..losses.logits import logit_loss_sum
from ..models.outputs import batch_size, logits_of
from ..teacher.outputs import TeacherOutputs
from ..teacher.running import TeacherRunner
from .attachment import DistillationTargets
from .batches import KnownShapes
from .counts import COUNTS, StepCounts, count_step, safe_labels, scaled
from .guard import FiniteGuard
from .language import LanguageTargets
from .monitor import Monitor
from .pair import Pair
from .plan import Plan, Services
from .task_loss import TaskLoss, zero_of

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Objective:
    """Runs both models on a micro-batch and returns what is minimized.

    Outside logging steps nothing here makes the host wait for the device.
    """

    plan: Plan
    pair: Pair
    loss: FeatureLoss | None
    run_teacher: TeacherRunner
    task_loss: TaskLoss
    guard: FiniteGuard
    monitor: Monitor
    services: Services
    statistics_ready: bool = False
    told: bool = False
    shapes: KnownShapes = field(default_factory=KnownShapes)

    def begin_step(self, batches: Sequence[Mapping[str, Any]], prepare: Callable[[Any], Any]) -> list[dict[str, Any]]:
        """Return an optimizer step's micro-batches with their counts; merge the teacher statistics of the last step.

        `prepare` moves a batch to the device.
        """
        counts = self._count(batches)
        self._tell_of_cut(len(batches))
        if self.services.processes > 1 and counts[0].stops is not None:
            self.services.stop.share(counts[0].stops)
        if self.loss is not None:
            self._merge_statistics(self.loss, batches, prepare)
        return [{**batch, COUNTS: entry} for batch, entry in zip(batches, counts, strict=True)]

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], step: int, return_outputs: bool = False) -> Any:
        """Return the loss of a micro-batch; the same one whenever it is called with the same batch and weights.

        With the outputs, a language model's logits are computed whole.

        Args:
            model: The student, wrapped or not.
            inputs: A micro-batch of `begin_step`, on the device. One without counts is a step of its own.
            step: The optimizer step, from 1.
            return_outputs: Whether to return the student's outputs too.
        """
        batch = {key: value for key, value in inputs.items() if key != COUNTS}
        counts = inputs[COUNTS] if COUNTS in inputs else self._count([batch])[0]
        with self.shapes.trying(batch):
            targets = self.run_teacher(batch)
            language = None if return_outputs else LanguageTargets.of(self.plan, targets.hidden, batch, counts)
            outputs, computed = self._run_student(model, batch, targets, counts, language)
            self.run_teacher.wait()
            if language is None:
                terms = self._dense_terms(outputs, self.run_teacher.whole(targets), batch, counts)
            else:
                terms = self._language_terms(computed, counts)
        if "per_sample" in computed:
            # Multiple choice has several rows a sample: the mean over rows is that over samples.
            terms["feature_loss"] = scaled(computed["per_sample"].mean(), counts.sample_scale())
        # In the total of a language model task and logit term have their gradients, and their weights.
        weights = {"task_loss": self.plan.task_weight, "logit_loss": self.plan.logit_weight}
        added = [name for name in terms if language is None or name not in weights]
        start = 0 if language is None else computed["total"]
        loss: Any = sum((weights.get(name, self.plan.feature_weight) * terms[name] for name in added), start)
        if terms.keys() == {"feature_loss"}:
            # The head learns nothing then, but a wrapper may wait for its gradient.
            loss = loss + zero_of(outputs)
        self.guard.check(loss, terms, batch, step)
        shares = {name: term / counts.processes for name, term in terms.items()}
        self.monitor.record(shares, computed, batch_size(batch), counts.items)
        return (loss, outputs) if return_outputs else loss

    def trial(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of a micro-batch that is a step of its own; other processes are not waited for."""
        labeled = self.plan.with_labels(batch)
        kind = self.plan.task, self.plan.shifts_labels
        counts = count_step([labeled], *kind, lambda total: total, own_loss=self.plan.own_loss)
        return self(model, {**batch, COUNTS: counts[0]}, 0)

    def _run_student(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        targets: TeacherOutputs,
        counts: StepCounts,
        language: LanguageTargets | None,
    ) -> tuple[Any, Mapping[str, Tensor]]:
        """Return the student's output and what its forward computed besides: of features, and of `language`."""
        inputs = self.pair.router.student_inputs(batch)
        if language is not None:
            inputs.pop("labels", None)
        elif self.task_loss.drops_labels and not self.pair.router.student_needs_labels(inputs):
            inputs.pop("labels", None)
        elif counts.ends is None:
            for name in {"labels", *self.plan.label_names} & inputs.keys():
                inputs[name] = safe_labels(inputs[name], counts.items)
        if self.loss is None and language is None:
            return model(**inputs), {}
        # A student that takes no mask (FNet) is compared where the batch has tokens all the same.
        told = {name: batch.get(name) for name in ("attention_mask", "position_ids")}
        told |= {**inputs, "labels": self.plan.labels_of(batch)}
        taught = DistillationTargets(targets.features, told, self.run_teacher.wait, language)
        outputs = model(**inputs, **taught.as_keyword())
        if isinstance(outputs, (tuple, list)) and len(outputs) == 2 and {"per_sample", "total"} & {*outputs[1]}:
            return outputs[0], outputs[1]
        raise SemCKDError(
            "The student's forward did not compute the distillation's losses",
            received=f"an output of type {type(outputs).__name__}",
            expected="the output and the losses of the attached forward",
            todo="do not replace the student's forward or wrap the student while it trains",
        )

    def _language_terms(self, sums: Mapping[str, Tensor], counts: StepCounts) -> dict[str, Tensor]:
        """Return task and logit term, without gradient, of the sums that the student's forward computed."""
        terms = {"logit_loss": scaled(sums["logit"], counts.logit_scale())}
        if self.plan.task_weight > 0:
            terms = {"task_loss": scaled(sums["task"], counts.task_sum_scale()), **terms}
        return terms

    def _dense_terms(
        self, outputs: Any, targets: TeacherOutputs, batch: Mapping[str, Any], counts: StepCounts
    ) -> dict[str, Tensor]:
        """Return task and logit term: shares of the step's means, times the processes."""
        plan = self.plan
        terms: dict[str, Tensor] = {}
        if plan.task_weight > 0:
            terms["task_loss"] = self.task_loss(outputs, batch, counts)
        if plan.distills_logits:
            taught = targets.logits if targets.sampled is None else targets.sampled
            assert taught is not None
            logits, labeled = plan.match(logits_of(outputs, "student"), taught), plan.with_labels(batch)
            total = logit_loss_sum(
                *logits, labeled, plan.temperature, plan.task, plan.shifts_labels, frames=targets.mask
            )
            terms["logit_loss"] = scaled(total, counts.logit_scale())
        return terms

    def _count(self, batches: Sequence[Mapping[str, Any]]) -> list[StepCounts]:
        plan, services = self.plan, self.services
        labeled = [plan.with_labels(batch) for batch in batches]
        kind = plan.task, plan.shifts_labels
        return count_step(
            labeled, *kind, services.reduce_sum, services.processes, services.stop.asked, own_loss=plan.own_loss
        )

    def _tell_of_cut(self, parts: int) -> None:
        """Say once that the task loss depends on how a step is cut, where it does and the step is."""
        plan, services = self.plan, self.services
        cut = parts > 1 or services.processes > 1
        if cut and not plan.own_loss.divisible and plan.task_weight > 0 and services.is_main and not self.told:
            self.told = True
            logger.warning(
                "The student's task loss is divided by the objects of each micro-batch, not of the whole optimizer "
                "step: with gradient accumulation or several processes it differs a little from that of one batch. "
                "Where that matters, raise per_device_train_batch_size and lower gradient_accumulation_steps."
            )

    def _merge_statistics(
        self, loss: FeatureLoss, batches: Sequence[Mapping[str, Any]], prepare: Callable[[Any], Any]
    ) -> None:
        """Merge teacher statistics once an optimizer step; the first step takes them from its own samples."""
        loss.collecting = True
        # Asking reads from the device: once a training is enough.
        needed, self.statistics_ready = not self.statistics_ready and loss.needs_statistics, True
        if needed:
            for batch in batches:
                outputs = self.run_teacher(prepare(batch))
                self.run_teacher.wait()
                loss.update_statistics(outputs.features)
            loss.collecting = False
        services = self.services
        loss.synchronize(services.reduce_sum, rank=services.rank, world=services.processes)
