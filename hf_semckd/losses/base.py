"""What every feature loss has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import InputError, message
from ..features.layers import FeatureSpec
from .options import LossOptions


@dataclass
class FeatureLossOutput:
    """What a feature loss returns.

    Attributes:
        total: Scalar, the mean of `per_sample`; before `feature_weight`.
        per_sample: (B) the loss of each sample, from which windows and processes are averaged exactly.
        attention: (B, S, T) association weights, or None for losses without any; without gradient.
        errors: (B, S, T) errors of the pairs, or None; without gradient, NaN where a pair is not compared.
    """

    total: Tensor
    per_sample: Tensor
    attention: Tensor | None = None
    errors: Tensor | None = None


class FeatureLoss(nn.Module, ABC):
    """A loss between the features of a student and those of a frozen teacher; its parameters train with the student.

    Attributes:
        default_weight: What `feature_weight` is where none is given; for a baseline, the published one.
        reuses_teacher_head: Whether the student is to end with the teacher's classifier; `finish` puts it there.
        upper_bound: The largest weight that its association can learn to give a layer; None when none are learned.
        required_batch_size: The only batch size that it takes, or None for any.
        automatic_synchronization: Merge teacher statistics, where there are any, at every training forward. A trainer
            sets it to False and calls `synchronize` once an optimizer step, which makes accumulation and processes
            exact.
        collecting: Whether training forwards observe teacher statistics; off for batches that were observed before.
    """

    default_weight: float = 1.0
    reuses_teacher_head: ClassVar[bool] = False
    upper_bound: float | None = None
    required_batch_size: int | None = None
    automatic_synchronization: bool = True
    collecting: bool = True

    @property
    def title(self) -> str:
        """What the method is called on a model card."""
        return type(self).__name__.removesuffix("Loss")

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of `SemCKDConfig` that depend on the models, as the loss uses them; for the record."""
        return {}

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
        """Return the loss for the layers that a trainer found; a baseline reads none of the options.

        Args:
            student_specs: The student's layers.
            teacher_specs: The teacher's layers.
            options: What the user chose.
            tokens_aligned: Whether position n of both models stands for the same input.
            student_parameters: Number of the student's parameters, for losses that keep themselves small beside it.

        Raises:
            ConfigurationError: When the method cannot be used for these layers.
        """
        return cls(student_specs, teacher_specs, tokens_aligned=tokens_aligned)

    @classmethod
    def find_layers(cls, model: nn.Module, role: str) -> list[str] | None:
        """Return the names of the modules that the method compares, where the user chose none; None for all blocks.

        Args:
            model: The student or the teacher.
            role: `student` or `teacher`, for messages.

        Raises:
            ConfigurationError: When the model has none of the kind.
        """
        return None

    def finish(self, student: nn.Module, teacher: nn.Module) -> Callable[[], None]:
        """Put into the plain student what it needs of this loss to be used; nothing for most losses.

        Called whenever the student is about to be evaluated, saved or handed back.

        Returns:
            What takes it out again: evaluating must not change the training.
        """
        return lambda: None

    @abstractmethod
    def forward(
        self,
        student_features: Sequence[Tensor],
        teacher_features: Sequence[Tensor] | Mapping[str, Tensor],
        student_mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> FeatureLossOutput:
        """Compare the features of a batch.

        Args:
            student_features: S tensors, maps (B, C, H, W) or tokens (B, N, C).
            teacher_features: T tensors likewise, or what `select` kept of them.
            student_mask: (B, N) of ones and zeros; padding tokens are 0. None: all count.
            teacher_mask: The same for the teacher's tokens.
        """

    @property
    def needs_statistics(self) -> bool:
        """Whether teacher statistics are needed before the first batch can be compared."""
        return False

    @property
    def samples_tokens(self) -> bool:
        """Whether `select` chooses among tokens, by the phase that it is given."""
        return False

    @property
    def kept(self) -> str:
        """What `select` keeps, in words: losses that say the same can share a teacher cache."""
        return "whole features"

    def select(
        self,
        teacher_features: Sequence[Tensor] | Mapping[str, Tensor],
        teacher_mask: Tensor | None = None,
        phase: Tensor | None = None,
    ) -> Sequence[Tensor] | Mapping[str, Tensor]:
        """Keep what the loss needs of the teacher's features; `forward` and `observe` take what this returns.

        A trainer calls it right after the teacher's forward, so that the rest is freed before the student runs, and
        stores what it returns in the teacher cache. It must not depend on anything that training changes.

        Args:
            teacher_features: T tensors, or what an earlier call returned, which comes back as it is.
            teacher_mask: (B, N) mask of the teacher's tokens.
            phase: (B) numbers in [0, 1) that depend on each sample's content, to choose among its tokens.

        Returns:
            Everything, here; a loss that needs less returns a flat mapping of tensors whose first dimension is the
            batch.
        """
        return teacher_features

    def update_statistics(
        self, teacher_features: Sequence[Tensor] | Mapping[str, Tensor], teacher_mask: Tensor | None = None
    ) -> None:
        """Collect teacher statistics without computing a loss; nothing to do for most losses."""
        return

    def synchronize(self, reduce_sum: Callable[[Tensor], Tensor] | None = None) -> None:
        """Take in what was observed since the last call, summed over processes; once an optimizer step.

        Args:
            reduce_sum: Adds a tensor over processes; None for a single process.
        """
        return


def layer_specs(shapes: Sequence[FeatureSpec | Sequence[int]], role: str) -> list[FeatureSpec]:
    """Return layers as they are described, or describe them from shapes (C, H, W) or (tokens, C).

    Raises:
        InputError: When there is no layer, or a shape is neither a map nor tokens.
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


def layer_count_message(received: tuple[int, int], expected: tuple[int, int]) -> str:
    """Say that a loss was given another number of features than it was built for."""
    return message(
        "The number of features is not the number of layers that the loss was built for",
        received=f"{received[0]} student and {received[1]} teacher features",
        expected=f"{expected[0]} and {expected[1]}",
        todo="pass one feature for each shape given at construction, in the same order",
    )
