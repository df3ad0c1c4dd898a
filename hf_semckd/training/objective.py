"""The part of a trainer that computes what is minimized: loss terms, exact over micro-batches and processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import NonFiniteLossError, SemCKDError
from ..losses.logits import cross_entropy, logit_loss_sum
from ..models.outputs import logits_of, token_attention
from ..models.tasks import batch_size
from ..teacher.outputs import TeacherOutputs
from .attachment import DistillationTargets
from .counts import count_step, safe_labels, scaled


@dataclass
class UnseenLoss:
    """A loss on its way from the device, not looked at yet.

    Attributes:
        step: The optimizer step that it belongs to, from 1.
        values: The loss and each term.
        names: Of the terms.
        batch: What the teacher was given, to find out afterwards whether it is to blame.
        arrived: Tells when `values` can be read; None when reading waits by itself.
    """

    step: int
    values: Tensor
    names: tuple[str, ...]
    batch: Mapping[str, Any]
    arrived: torch.cuda.Event | None = None

    def read(self) -> list[float]:
        """Return the values, waiting for them where they have not arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


class ObjectiveTrainer(Trainer):
    """Counts the items of an optimizer step and weighs the loss terms; a base of `DistillationTrainer`.

    Trainer averages gradients over processes and adds them over micro-batches. Every term is therefore a sum over
    items, divided by the number of items in the whole step on all processes, times the number of processes.

    Outside logging steps nothing here makes the host wait for the device.

    Attributes:
        checks_later: Whether a loss is looked at one step late (and before anything is logged or saved) instead of at
            once, which would make the host wait for the device; None: everywhere but on the CPU.
    """

    checks_later: bool | None = None
    _statistics_ready: bool
    _unseen: UnseenLoss | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and look at the last loss before anyone believes in the result; see `Trainer.train`."""
        self._unseen = None
        try:
            result = super().train(*args, **kwargs)
            self._look_at_unseen()
        finally:
            self._unseen = None
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, but nothing that comes of a broken loss."""
        if "loss" in logs and self.is_in_train:
            self._look_at_unseen()
        super().log(logs, start_time)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._look_at_unseen()
        super()._save_checkpoint(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Fetch an optimizer step's micro-batches and count what its terms are averages over, on all processes."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._distils and batches:
            self._counts = count_step(
                [self._with_labels(batch) for batch in batches],
                self._task,
                self._shifts_labels,
                self._sum_over_processes,
            )
            self._counts.processes = self.accelerator.num_processes
            self._prepare_statistics(batches)
        return batches, items

    @property
    def feature_weight(self) -> float:
        """The weight of the feature term: what was asked for, or what suits the feature loss."""
        if self.args.feature_weight is not None or self.feature_loss is None:
            return self.args.feature_weight or 0.0
        return self.feature_loss.default_weight

    def distillation_settings(self) -> dict[str, Any]:
        """Return what is asked of the distillation, with what is used where it was left open, ready for JSON."""
        used = {} if self.feature_loss is None else self.feature_loss.settings
        return {**self.args.distillation_settings(), **used, "feature_weight": self.feature_weight}

    @property
    def _shifts_labels(self) -> bool:
        base = self.student.get_base_model() if hasattr(self.student, "get_base_model") else self.student
        return type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.args.device), reduction="sum").to(tensor.device)

    def _prepare_statistics(self, batches: list[Any]) -> None:
        """Merge teacher statistics once an optimizer step; the first step takes them from its own samples."""
        loss = self.feature_loss
        if loss is None or not self._attached:
            return
        loss.collecting = True
        # Asking costs a look at the device: once a training is enough.
        needed, self._statistics_ready = not self._statistics_ready and loss.needs_statistics, True
        if needed:
            for batch in batches:
                outputs = self._run_teacher(self._prepare_input(batch))
                self._teacher.wait()
                loss.update_statistics(outputs.features)
            loss.collecting = False
        loss.synchronize(self._sum_over_processes)

    def _run_teacher(self, batch: Mapping[str, Any]) -> TeacherOutputs:
        """Return the teacher's outputs, in mixed precision where the student has it; `wait()` before using them."""
        logits, features = self.args.distils_logits, self._distils_features
        select = self._select_features if features and self.feature_loss is not None else None
        # accelerate wraps the student's forward alone; the teacher's takes several times as long without.
        with self.accelerator.autocast():
            return self._teacher.aside(
                lambda: self._teacher.run(batch, logits=logits, features=features, select=select)
            )

    def _select_features(self, features: Any, mask: Tensor | None, phases: Callable[[], Tensor]) -> Any:
        """Let go of what the feature loss does not need, before the student runs."""
        return self.feature_loss.select(features, mask, phases() if self.feature_loss.samples_tokens else None)

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
        targets = self._run_teacher(inputs)
        student_inputs = self._student_inputs(inputs)
        labels = self._labels_of(inputs)
        items = self._counts.task_items.popleft()
        if self._drops_labels:
            student_inputs.pop("labels", None)
        elif "labels" in student_inputs:
            student_inputs["labels"] = safe_labels(student_inputs["labels"], items)
        keyword = {}
        if self._distils_features:
            mask = token_attention(student_inputs, labels, self.student)
            keyword = DistillationTargets(targets.features, mask, self._teacher.wait).as_keyword()
        outputs = model(**student_inputs, **keyword)
        self._teacher.wait()
        outputs, features = self._split(outputs) if keyword else (outputs, None)
        terms = self._terms(outputs, features, targets, inputs, items)
        loss = sum(weight * term for weight, term in terms.values())
        if terms.keys() == {"feature_loss"}:
            # The head learns nothing then, but a wrapper may wait for its gradient.
            loss = loss + _zero(outputs)
        self._check_finite(loss, terms, inputs, targets)
        self._record(terms, features)
        if not hasattr(Trainer, "loss_is_scaled_for_ga") and self.compute_loss_func is None:
            # Before transformers 5.2x Trainer divides by the accumulation steps once more.
            loss = loss * self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    @property
    def _drops_labels(self) -> bool:
        """Whether the student must not compute the task loss by itself."""
        custom = self.compute_loss_func is not None or self.label_smoother is not None
        return custom or self.args.task_weight == 0 or not self._student_computes_loss

    def _with_labels(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the batch with its labels under the usual name, where a plain model calls them otherwise."""
        if "labels" in batch or self._student_computes_loss:
            return batch
        labels = self._labels_of(batch)
        return batch if labels is None else {**batch, "labels": labels}

    def _labels_of(self, inputs: Mapping[str, Any]) -> Any:
        return next((inputs[name] for name in ("labels", *self.label_names) if name in inputs), None)

    @property
    def _student_computes_loss(self) -> bool:
        return any(name in self._student_takes for name in (*self.label_names, "labels"))

    @staticmethod
    def _split(outputs: Any) -> tuple[Any, dict[str, Tensor]]:
        """Take the student's own output and the feature loss apart, which its attached forward returns together."""
        if isinstance(outputs, (tuple, list)) and len(outputs) == 2 and "per_sample" in outputs[1]:
            return outputs[0], outputs[1]
        raise SemCKDError(
            "The student's forward did not compute the feature loss",
            received=f"an output of type {type(outputs).__name__}",
            expected="the output and the feature loss of the attached forward",
            todo="do not replace the student's forward or wrap the student while it trains",
        )

    def _plain_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, items: Any) -> Any:
        labels = self._labels_of(inputs)
        if not self._distils or self._student_computes_loss or labels is None or self.compute_loss_func:
            return super().compute_loss(model, inputs, return_outputs, items)
        names = {"labels", *self.label_names}
        outputs = model(**{key: value for key, value in inputs.items() if key not in names})
        logits = logits_of(outputs, "student")
        loss = cross_entropy(logits, labels)
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def _terms(
        self, outputs: Any, features: Any, targets: TeacherOutputs, batch: Mapping[str, Any], items: Tensor
    ) -> dict[str, tuple[float, Tensor]]:
        """Return weight and value of each term; values are shares of the window's mean, times the processes."""
        window, args = self._counts, self.args
        terms: dict[str, tuple[float, Tensor]] = {}
        if args.task_weight > 0:
            terms["task_loss"] = (args.task_weight, self._task_loss(outputs, self._labels_of(batch), items))
        if args.distils_logits:
            assert targets.logits is not None
            student = logits_of(outputs, "student")
            total = logit_loss_sum(
                student, targets.logits, self._with_labels(batch), args.temperature, self._task, self._shifts_labels
            )
            terms["logit_loss"] = (args.logit_weight, scaled(total, window.logit_scale()))
        if features is not None:
            # Multiple choice has several rows a sample: the mean over rows is that over samples.
            rows = features["per_sample"]
            share = scaled(rows.mean() * batch_size(batch), window.sample_scale())
            terms["feature_loss"] = (self.feature_weight, share)
        return terms

    def _task_loss(self, outputs: Any, labels: Any, items: Tensor) -> Tensor:
        """Return the micro-batch's share of the task loss; without a single label, 0 that reaches every parameter."""
        window = self._counts
        labels = safe_labels(labels, items)
        if self.compute_loss_func is not None:
            total = window.totals[0].clamp(min=1).to(self.args.device, torch.float32, non_blocking=True)
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=total)
            return scaled(loss, (items > 0) * window.processes)
        if self.label_smoother is not None and labels is not None:
            loss = self.label_smoother(outputs, labels, shift_labels=self._shifts_labels)
        elif not self._student_computes_loss:
            loss = cross_entropy(logits_of(outputs, "student"), labels)
        else:
            loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
        return scaled(loss, window.task_scale(items))

    # ---- Nothing broken is learned, logged or saved ----------------------------------------------------------------

    @property
    def _checks_later(self) -> bool:
        return self.args.device.type != "cpu" if self.checks_later is None else self.checks_later

    def _check_finite(
        self,
        loss: Any,
        terms: Mapping[str, tuple[float, Tensor]],
        batch: Mapping[str, Any],
        targets: TeacherOutputs,
    ) -> None:
        values = torch.stack([loss.detach(), *(value.detach().to(loss.dtype) for _, value in terms.values())])
        seen = UnseenLoss(self.state.global_step + 1, values, tuple(terms), batch)
        if not self._checks_later:
            self._refuse_broken(seen, targets)
            return
        if values.is_cuda:
            # From CUDA, such a copy goes to pinned memory, and the host goes on.
            seen.values, seen.arrived = values.to("cpu", non_blocking=True), torch.cuda.Event()
            seen.arrived.record()
        # The one before has arrived while this one was computed.
        before, self._unseen = self._unseen, seen
        if before is not None:
            self._refuse_broken(before)

    def _look_at_unseen(self) -> None:
        """Look at the last loss, on all processes at once: gradients are shared, and so is what breaks them."""
        if not (self._distils and self._checks_later):
            return
        unseen, self._unseen = self._unseen, None
        finite = torch.tensor(float(unseen is None or math.isfinite(unseen.read()[0])))
        everywhere = float(self._sum_over_processes(finite)) == self.accelerator.num_processes
        if unseen is not None:
            self._refuse_broken(unseen)
        if not everywhere:
            raise NonFiniteLossError(
                f"The loss of another process is not finite in step {self.state.global_step}",
                received="NaN or infinity there, and with it in the gradient here",
                expected="finite loss terms",
                todo="see the error of that process",
            )

    def _refuse_broken(self, seen: UnseenLoss, targets: TeacherOutputs | None = None) -> None:
        loss, *values = seen.read()
        if math.isfinite(loss):
            return
        assert self._teacher is not None
        if targets is None:
            # Not kept: that would hold the features for a whole step. A frozen teacher gives them again.
            targets = self._run_teacher(seen.batch)
            self._teacher.wait()
        self._teacher.check_finite(targets)
        named = zip(seen.names, values, strict=True)
        broken = [f"{name} = {value:g}" for name, value in named if not math.isfinite(value)]
        weights = (
            "the weights in memory broken and the checkpoints intact"
            if self._checks_later
            else "the weights untouched"
        )
        raise NonFiniteLossError(
            f"The loss is not finite in step {seen.step}; training stops with {weights}",
            received=", ".join(broken) or "a sum of finite terms that overflows",
            expected="finite loss terms",
            todo="lower the learning rate, clip gradients (max_grad_norm), use bf16 instead of fp16, and "
            "go on from the last checkpoint with train(resume_from_checkpoint=True)",
        )


def _zero(outputs: Any) -> Tensor:
    """Return a zero that depends on the student's outputs, so that backward reaches every parameter."""
    values = (
        outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple) else (outputs,)
    )
    tensors = [value for value in values if isinstance(value, Tensor) and value.requires_grad and value.dim()]
    return torch.stack([tensor.sum() for tensor in tensors]).sum() * 0.0 if tensors else torch.zeros(())
