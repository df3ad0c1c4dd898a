"""The interface of every feature loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..choices import Association, ProjectionInit, Projector, TargetNorm
from ..errors import InputError
from ..features.layers import FeatureSpec
from ..features.targets import Features, LayerMasks, TeacherTargets
from .fitting import check_features, check_masks, check_same_samples

Shape = FeatureSpec | Sequence[int]
Shapes = Sequence[Shape]


@dataclass(frozen=True)
class LossOptions:
    """Choices for a feature loss, as in `SemCKDConfig`; None where the layers decide. Baselines have none."""

    association: Association | None = None
    association_temperature: float | None = None
    target_norm: TargetNorm = "channel"
    projector: Projector | None = None
    projection_init: ProjectionInit | None = None
    relation_weight: float | None = None
    association_bank: int = 0
    max_tokens: int = 16
    max_grid: int | None = None
    # Samples in every training batch, which the published association is built for.
    batch_size: int | None = None
    # Whether the student's last layer may be left to the logits.
    spares_last_layer: bool = True


@dataclass
class FeatureLossOutput:
    """The result of a feature loss: the loss of each sample (B), and `total`, its mean, before `feature_weight`.

    `association` (B, S, T) are the weights and `errors` (B, S, T) the errors of pairs, NaN where one is not compared;
    both without gradient, and None for losses without any.
    """

    total: Tensor
    per_sample: Tensor
    association: Tensor | None = None
    errors: Tensor | None = None


class FeatureLoss(nn.Module, ABC):
    """A loss between the features of a student and those of a frozen teacher; its parameters train with the student.

    A subclass implements `compare`. In all of them S is the number of student layers, T that of teacher layers, B the
    batch size; a feature is a map (B, C, H, W), tokens (B, N, C) or a vector (B, C).

    Attributes:
        title: Name of the method on a model card; by default the class's.
        student_specs, teacher_specs: The layers the loss was built for; empty for a loss that takes any.
        default_weight: `feature_weight` where none is given; for a baseline, the published one.
        kept: Description of what `select` keeps: losses with equal descriptions share a teacher cache.
        samples_tokens: Whether `select` samples tokens, at positions that depend on `phase`.
        reuses_teacher_head: Whether the student ends with the teacher's classifier, which `finish` puts there.
        compares_both_sides: Whether an encoder-decoder's encoder is compared as well as its decoder.
        upper_bound: The largest weight that a learned association can give a layer; None when none is learned.
        required_batch_size: The only batch size the loss takes, or None for any.
        automatic_synchronization: Merge teacher statistics, where there are any, at every training forward. A trainer
            turns it off and calls `synchronize` once per optimizer step, which makes accumulation and processes exact.
        collecting: Whether training forwards collect teacher statistics; off for batches that were collected before.
    """

    title: str = ""
    student_specs: Sequence[FeatureSpec] = ()
    teacher_specs: Sequence[FeatureSpec] = ()
    default_weight: float = 1.0
    kept: str = "whole features"
    samples_tokens: bool = False
    reuses_teacher_head: ClassVar[bool] = False
    compares_both_sides: ClassVar[bool] = False
    upper_bound: float | None = None
    required_batch_size: int | None = None
    automatic_synchronization: bool = True
    collecting: bool = True

    def __init_subclass__(cls) -> None:
        cls.title = cls.__dict__.get("title", cls.__name__.removesuffix("Loss"))

    @property
    def settings(self) -> dict[str, Any]:
        """Values in use of the `SemCKDConfig` fields whose defaults depend on the models."""
        return {}

    @property
    def needs_statistics(self) -> bool:
        """Whether teacher statistics have to be collected before the first batch; a host sync."""
        return False

    @classmethod
    def for_layers(
        cls,
        student_specs: Sequence[FeatureSpec],
        teacher_specs: Sequence[FeatureSpec],
        options: LossOptions,
        *,
        tokens_aligned: bool = True,
        student_parameters: int | None = None,
    ) -> FeatureLoss:
        """Return the loss for the layers that a trainer found, or raise `ConfigurationError` where it cannot be used.

        `tokens_aligned` tells whether position n of both models stands for the same input; `student_parameters` is the
        number of the student's parameters, for losses that limit their own size by it.
        """
        return cls(student_specs, teacher_specs, tokens_aligned=tokens_aligned)

    @classmethod
    def find_layers(cls, model: nn.Module, role: str) -> list[str] | None:
        """Return the modules of a model that the method compares, None for all; `ConfigurationError` for none."""
        return None

    def finish(self, student: nn.Module, teacher: nn.Module) -> Callable[[], None]:
        """Write what inference needs of this loss into the plain student, and return a function that undoes it.

        Called before every evaluation, before saving and at the end of training; nothing for most losses.
        """
        return lambda: None

    def forward(
        self,
        student_features: Features,
        teacher_features: Features | TeacherTargets,
        student_mask: LayerMasks = None,
        teacher_mask: LayerMasks = None,
    ) -> FeatureLossOutput:
        """Return the loss of a batch.

        Args:
            student_features, teacher_features: S and T tensors, or what `select` kept of the teacher's.
            student_mask, teacher_mask: (B, N), 0 for padding tokens, or one for each layer where the method
                `compares_both_sides`; None: all count. The teacher's is not needed where `select` was called.

        Raises `InputError` when the features are not those of the layers: another number, rank, width or type, or
        other samples of the teacher.
        """
        expected = len(self.student_specs), len(self.teacher_specs)
        teachers = expected[1] if isinstance(teacher_features, TeacherTargets) else len(teacher_features)
        received = len(student_features), teachers
        if expected != (0, 0) and received != expected:
            raise InputError(
                "The number of features is not the number of layers that the loss was built for",
                received=f"{received[0]} student and {received[1]} teacher features",
                expected=f"{expected[0]} and {expected[1]}",
                todo="pass one feature for each shape given at construction, in the same order",
            )
        check_features(student_features, self.student_specs, "student")
        if not isinstance(teacher_features, TeacherTargets):
            check_features(teacher_features, self.teacher_specs, "teacher")
        check_masks(student_mask, "student")
        check_masks(teacher_mask, "teacher")
        targets = self.targets(teacher_features, teacher_mask)
        check_same_samples(student_features, targets)
        return self.compare(student_features, targets, student_mask)

    @abstractmethod
    def compare(
        self, student_features: Features, targets: TeacherTargets, student_mask: LayerMasks
    ) -> FeatureLossOutput:
        """Return the loss of a batch; the arguments are those of `forward`.

        `targets` hold what `select` keeps: by default every layer's `whole` output, and `mask`.
        """

    def select(self, features: Features, mask: LayerMasks = None, phase: Tensor | None = None) -> TeacherTargets:
        """Return what the loss needs of the teacher's features; here, all of them.

        A trainer calls it right after the teacher's forward, so that the rest is freed before the student runs, and
        stores the result in the teacher cache. It must not depend on anything that training changes. `phase` (B) are
        numbers in [0, 1) that depend on each sample's content, to sample its tokens by.
        """
        return TeacherTargets.of_whole(features, mask)

    def targets(self, features: Features | TeacherTargets, mask: LayerMasks = None) -> TeacherTargets:
        """Return what `select` keeps of features; targets come back as they are."""
        return features if isinstance(features, TeacherTargets) else self.select(features, mask)

    def update_statistics(self, teacher_features: Features | TeacherTargets, teacher_mask: LayerMasks = None) -> None:
        """Collect teacher statistics without computing a loss; nothing to do for most losses."""
        return

    def forget_collected(self) -> None:
        """Forget what was collected since the last `synchronize`: a training begins, or goes on from a checkpoint."""
        return

    def synchronize(
        self, reduce_sum: Callable[[Tensor], Tensor] | None = None, *, rank: int = 0, world: int = 1
    ) -> None:
        """Merge what was collected since the last call, once per optimizer step.

        `reduce_sum` adds a tensor over `world` processes, of which this is number `rank`; None for a single process.
        """
        return


def layer_specs(shapes: Shapes, role: str) -> list[FeatureSpec]:
    """Return the specifications of layers that may be given as shapes (C, H, W) or (tokens, C).

    Raises `InputError` when there is no layer, or a shape is neither a map nor tokens.
    """
    if not len(shapes):
        raise InputError(
            f"There is no {role} layer",
            received="an empty list of shapes",
            expected="at least one",
            todo=f"give one shape for every {role} layer",
        )
    return [
        shape if isinstance(shape, FeatureSpec) else FeatureSpec.from_shape(shape, f"{role} {index}")
        for index, shape in enumerate(shapes)
    ]
