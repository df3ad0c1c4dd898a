"""Ways to weigh teacher layers that are compared with the library's, and are not part of it.

Each takes the place of a `SemCKDLoss`'s association: targets, projections and errors stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_semckd import DistillationTrainer
from hf_semckd.errors import ConfigurationError
from hf_semckd.losses import CombinedLoss, FeatureLoss, SemCKDLoss
from hf_semckd.losses.registry import find_layers, make_feature_loss
from hf_semckd.losses.semckd.alignment import AlignedStudent, AlignedTeacher
from hf_semckd.losses.semckd.association import Association
from hf_semckd.losses.semckd.comparison import Comparison
from hf_semckd.losses.similarity import similarity_matrix

from .protocol import Method

# Turns the loss that the library made into another one; takes what `FeatureLoss.for_layers` takes besides.
Change = Callable[..., FeatureLoss]
SHARPNESS = 0.2
# Of the look-ahead: steps between updates, their size, and what is forgotten of the past.
EVERY, RATE, MEMORY = 5, 1.0, 0.95


class CenteredKernelAlignment(Association):
    """One weight for a whole batch: softmax over t of the CKA of layers s and t (Kornblith et al., 2019) / 0.2."""

    name = "cka"

    @torch.no_grad()
    def weights(self, student: AlignedStudent, teacher: AlignedTeacher) -> Tensor:
        """Return the weights (B, S, T)."""
        own = [_centered(student.summary(s)) for s in range(len(student.specs))]
        theirs = [_centered(teacher.summary(t)) for t in range(len(teacher.specs))]
        alignment = torch.stack([torch.stack([_cosine(left, right) for right in theirs]) for left in own])
        return torch.softmax(alignment / SHARPNESS, -1).expand(len(student.features[0]), -1, -1)


class RandomWeights(Association):
    """Weights drawn anew for every batch, sample and student layer, uniformly from the simplex."""

    name = "random"

    def weights(self, student: AlignedStudent, teacher: AlignedTeacher) -> Tensor:
        """Return the weights (B, S, T)."""
        drawn = torch.empty(len(student.features[0]), len(student.specs), len(teacher.specs)).exponential_()
        return drawn / drawn.sum(-1, keepdim=True)


class GradientAgreement(Association):
    """Weights by how much a pair's gradient at the student's features points where the task's does.

    softmax over t of cosine(d error_st / d F_s, d task / d F_s) / 0.2 for each sample; the trainer leaves the task's
    gradients in `task_gradients` before each forward.
    """

    name = "gradient"
    task_gradients: Sequence[Tensor] | None = None

    def __init__(self, comparison: Comparison):
        self.comparison = comparison

    def weights(self, student: AlignedStudent, teacher: AlignedTeacher) -> Tensor:
        """Return the weights (B, S, T)."""
        batch, teachers = len(student.features[0]), len(teacher.specs)
        uniform = student.features[0].new_full((batch, len(student.specs), teachers), 1.0 / teachers)
        if self.task_gradients is None or not torch.is_grad_enabled():
            return uniform
        leaves = [feature.detach().requires_grad_() for feature in student.features]
        agreement = uniform.new_zeros(uniform.shape)
        own = student.with_features(leaves)
        for t in range(teachers):
            # All weight on one layer: the weighted error is that of the pair.
            errors, _ = self.comparison.errors(own, teacher, one_hot(uniform, t))
            for s, gradient in enumerate(torch.autograd.grad(errors.sum(), leaves[: self.comparison.compared])):
                agreement[:, s, t] = F.cosine_similarity(gradient.flatten(1), self.task_gradients[s].flatten(1))
        return torch.softmax(agreement / SHARPNESS, -1)


class LookAhead(nn.Module, Association):
    """One set of weights, moved so that a step on the weighted errors would lower the task loss of another batch.

    To first order, one step of size r on sum_t w_st e_st changes the task loss by -r * sum_t w_st <d task, d e_st>
    over the student's parameters (Ren et al., 2018; Jang et al., 2019). Every 5 steps the cosines of these gradients,
    scaled to unit spread, are taken into a running score; weights are its softmax.
    """

    name = "lookahead"

    def __init__(self, students: int, teachers: int):
        super().__init__()
        self.register_buffer("score", torch.zeros(students, teachers))

    def weights(self, student: AlignedStudent, teacher: AlignedTeacher) -> Tensor:
        """Return the weights (B, S, T)."""
        return torch.softmax(self.score, -1).expand(len(student.features[0]), -1, -1)

    def look(self, agreement: Tensor) -> None:
        """Take the cosines (S, T) of one look into the score."""
        spread = (agreement - agreement.mean(-1, keepdim=True)) / agreement.std(correction=0).clamp(min=1e-6)
        self.score.mul_(MEMORY).add_((1 - MEMORY) * RATE * spread * 2)


class GradientTrainer(DistillationTrainer):
    """Leaves the gradient of the task loss at the student's features where `GradientAgreement` looks for it."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        """Return the loss of a batch, after one more forward and backward of the student for the task alone."""
        if self.model.training and self.is_in_train:
            outputs, features = _plain_forward(self, inputs)
            gradients = torch.autograd.grad(outputs.loss, features, allow_unused=True)
            self.feature_loss.association.task_gradients = [
                torch.zeros_like(x) if g is None else g for g, x in zip(gradients, features, strict=True)
            ]
        return super().compute_loss(model, inputs, *args, **options)


class LookAheadTrainer(DistillationTrainer):
    """Updates the scores of `LookAhead` every few steps, from the pair errors of a batch and the task of the last."""

    _steps_done = 0
    _last: Any = None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        """Return the loss of a batch, after a look ahead where one is due."""
        if self.model.training and self.is_in_train:
            loss = self.feature_loss
            if self._last is not None and self._steps_done % EVERY == 0 and not loss.needs_statistics:
                loss.association.look(self._agreement(inputs))
            self._steps_done, self._last = self._steps_done + 1, inputs
        return super().compute_loss(model, inputs, *args, **options)

    def _agreement(self, inputs: Any) -> Tensor:
        loss = self.feature_loss
        parameters = [entry for entry in self.student.parameters() if entry.requires_grad]
        own = {id(entry) for entry in loss.parameters()}
        parameters = [entry for entry in parameters if id(entry) not in own]
        task, _ = _plain_forward(self, self._last)
        direction = _flat(torch.autograd.grad(task.loss, parameters, allow_unused=True), parameters)
        targets = self.distillation.run_teacher(inputs).features
        _, features = _plain_forward(self, inputs)
        student, teacher = loss.align(features, targets, inputs.get("attention_mask"))
        found = torch.zeros_like(loss.association.score)
        uniform = features[0].new_full((len(features[0]), *found.shape), 1.0 / found.shape[1])
        for t in range(found.shape[1]):
            errors, _ = loss.comparison.errors(student, teacher, one_hot(uniform, t))
            for s in range(loss.compared):
                gradient = torch.autograd.grad(errors[:, s].mean(), parameters, retain_graph=True, allow_unused=True)
                found[s, t] = F.cosine_similarity(_flat(gradient, parameters), direction, dim=0)
        return found


STUDIED: dict[str, tuple[type[DistillationTrainer], Callable[[SemCKDLoss], Association]]] = {
    "cka": (DistillationTrainer, lambda _: CenteredKernelAlignment()),
    "random": (DistillationTrainer, lambda _: RandomWeights()),
    "gradient": (GradientTrainer, lambda loss: GradientAgreement(loss.comparison)),
    "lookahead": (LookAheadTrainer, lambda loss: LookAhead(len(loss.student_specs), len(loss.teacher_specs))),
}


def trainer_class(method: Method) -> type[DistillationTrainer]:
    """Return the trainer that a method needs: the library's own, or one that makes a study's loss.

    Raises:
        ConfigurationError: For an unknown association.
    """
    if method.association is None:
        return (
            DistillationTrainer if not method.options else _with_loss(DistillationTrainer, _made_with(method.options))
        )
    if method.association not in STUDIED:
        raise ConfigurationError(
            "Unknown association",
            received=method.association,
            expected=", ".join(STUDIED),
            todo="correct the method",
        )
    trainer, association = STUDIED[method.association]
    return _with_loss(trainer, _weighted_by(association))


def _with_loss(trainer: type[DistillationTrainer], change: Change) -> Any:
    """Return a trainer that changes the feature loss that the library makes."""

    class Changed(trainer):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, feature_loss: str = "semckd", **options: Any):
            class Made(FeatureLoss):
                @classmethod
                def for_layers(cls, *specs: Any, **known: Any) -> FeatureLoss:
                    return change(make_feature_loss(feature_loss, *specs, **known), *specs, **known)

                @classmethod
                def find_layers(cls, model: Any, role: str) -> list[str] | None:
                    return find_layers(feature_loss, model, role)

            super().__init__(*args, feature_loss=Made, **options)

    return Changed


def _made_with(options: Mapping[str, Any]) -> Change:
    def change(made: Any, *specs: Any, **known: Any) -> FeatureLoss:
        if isinstance(made, CombinedLoss):
            parts = list(made.losses)
            return CombinedLoss([*parts[:-1], change(parts[-1], *specs, **known)])
        return type(made)(*specs[:2], tokens_aligned=known["tokens_aligned"], **options)

    return change


def _weighted_by(association: Callable[[SemCKDLoss], Association]) -> Change:
    def change(made: Any, *specs: Any, **known: Any) -> FeatureLoss:
        made.association = association(made)
        return made

    return change


def one_hot(like: Tensor, layer: int) -> Tensor:
    """Return weights (B, S, T) that lie on one teacher layer."""
    weights = torch.zeros_like(like)
    weights[..., layer] = 1.0
    return weights


def _plain_forward(trainer: DistillationTrainer, inputs: Any) -> tuple[Any, list[Tensor]]:
    """Run the student for the task alone; return its output and the features that are distilled."""
    student, capture = trainer.student, trainer.pair.capture
    own = trainer.pair.router.student_inputs(inputs)
    with capture.recording(student) as recorded:
        outputs = student(**own, **capture.request())
    return outputs, capture.collect(outputs, recorded)


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    return torch.cat([entry.flatten() for entry in filled])


def _centered(rows: Tensor) -> Tensor:
    similarity = similarity_matrix(rows)
    similarity = similarity - similarity.mean(0, keepdim=True)
    return similarity - similarity.mean(1, keepdim=True)


def _cosine(own: Tensor, theirs: Tensor) -> Tensor:
    return (own * theirs).sum() / (own.norm() * theirs.norm()).clamp(min=1e-12)
