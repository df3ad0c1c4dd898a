"""What the methods that SemCKD is compared with have in common: layers, how they meet, and what is kept of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from ..errors import InputError
from ..features.geometry import Alignment
from ..features.layers import FeatureSpec
from ..features.summaries import Average, embedding
from .base import FeatureLoss, FeatureLossOutput, layer_count_message, layer_specs
from .positions import compared_positions

Shape = FeatureSpec | Sequence[int]


class BaselineLoss(FeatureLoss):
    """A loss on some of the layers; of the teacher's only these are kept.

    A subclass returns the loss of each sample (`per_sample`).

    Args:
        student_shapes: One (C, H, W), (tokens, C) or `FeatureSpec` for each student layer.
        teacher_shapes: The same for each teacher layer.
        tokens_aligned: Whether position n of both models stands for the same input.
        used_teacher_layers: Positions in `teacher_shapes`, negative ones from the end; None for `default_used`.

    Attributes:
        default_used: The teacher layers that the method uses, None for all.

    Raises:
        InputError: When there is no layer, or a shape is neither a map nor tokens.
    """

    default_used: ClassVar[Sequence[int] | None] = None

    def __init__(
        self,
        student_shapes: Sequence[Shape],
        teacher_shapes: Sequence[Shape],
        *,
        tokens_aligned: bool = True,
        used_teacher_layers: Sequence[int] | None = None,
    ):
        super().__init__()
        self.student_specs = layer_specs(student_shapes, "student")
        self.teacher_specs = layer_specs(teacher_shapes, "teacher")
        self.tokens_aligned = tokens_aligned
        count = len(self.teacher_specs)
        used = self.default_used if used_teacher_layers is None else used_teacher_layers
        used = range(count) if used is None else used
        self.used_teacher_layers = sorted({layer % count for layer in used})

    def forward(
        self,
        student_features: Sequence[Tensor],
        teacher_features: Sequence[Tensor] | Mapping[str, Tensor],
        student_mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> FeatureLossOutput:
        """Compare the features of a batch; see `FeatureLoss.forward`.

        Raises:
            InputError: When the number of features is not the number of layers.
        """
        targets = self.select(teacher_features, teacher_mask)
        if len(student_features) != len(self.student_specs):
            received = (len(student_features), len(self.teacher_specs))
            raise InputError(layer_count_message(received, (len(self.student_specs), len(self.teacher_specs))))
        losses = self.per_sample(student_features, targets, student_mask)
        return FeatureLossOutput(losses.mean(), losses)

    @abstractmethod
    def per_sample(
        self, student_features: Sequence[Tensor], targets: Mapping[str, Tensor], student_mask: Tensor | None
    ) -> Tensor:
        """Return the loss of each sample (B).

        Args:
            student_features: S student features.
            targets: What `select` kept: `whole.t` for each used teacher layer t, and perhaps `mask`.
            student_mask: (B, N) mask of the student's tokens.
        """

    @property
    def kept(self) -> str:
        """What `select` keeps, in words."""
        return f"whole features of the layers at {self.used_teacher_layers}"

    def select(
        self,
        teacher_features: Sequence[Tensor] | Mapping[str, Tensor],
        teacher_mask: Tensor | None = None,
        phase: Tensor | None = None,
    ) -> Mapping[str, Tensor]:
        """Keep the teacher layers that are used; see `FeatureLoss.select`.

        Raises:
            InputError: When there is another number of teacher features than layers.
        """
        if isinstance(teacher_features, Mapping):
            return teacher_features
        if len(teacher_features) != len(self.teacher_specs):
            expected = (len(self.student_specs), len(self.teacher_specs))
            raise InputError(layer_count_message((expected[0], len(teacher_features)), expected))
        kept = {f"whole.{t}": teacher_features[t].detach() for t in self.used_teacher_layers}
        return kept if teacher_mask is None else {**kept, "mask": teacher_mask}

    def positions(
        self,
        student_features: Sequence[Tensor],
        targets: Mapping[str, Tensor],
        s: int,
        t: int,
        student_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return student layer s and teacher layer t as tokens (B, N, C) at the same positions, and their mask (B, N).

        Maps come pooled to the smaller grid, row by row.
        """
        s, t = s % len(self.student_specs), t % len(self.teacher_specs)
        return compared_positions(
            Alignment.of(self.student_specs[s], self.teacher_specs[t], self.tokens_aligned),
            (student_features[s], self.student_specs[s]),
            (targets[f"whole.{t}"], self.teacher_specs[t]),
            student_mask,
            targets.get("mask"),
        )

    def embeddings(
        self, student_features: Sequence[Tensor], targets: Mapping[str, Tensor], student_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the embeddings (B, C_s) and (B, C_t) of both models' last layers; see `calibration.embedding`."""
        last = len(self.teacher_specs) - 1
        return (
            embedding(student_features[-1], self.student_specs[-1], Average(student_mask)),
            embedding(targets[f"whole.{last}"], self.teacher_specs[last], Average(targets.get("mask"))),
        )


class SkipMapLoss(BaselineLoss):
    """A loss that pairs every student layer with the teacher layer at its depth.

    Args:
        student_shapes: As in `BaselineLoss`.
        teacher_shapes: As in `BaselineLoss`.
        tokens_aligned: As in `BaselineLoss`.

    Attributes:
        teacher_of: The teacher layer of each student layer, see `calibration.skip_map`.

    Raises:
        InputError: When there is no layer, or a shape is neither a map nor tokens.
    """

    def __init__(
        self, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape], *, tokens_aligned: bool = True
    ):
        # Without a layer there is no map; what is refused is said by the base.
        pairing = skip_map(max(len(student_shapes), 1), max(len(teacher_shapes), 1))
        super().__init__(student_shapes, teacher_shapes, tokens_aligned=tokens_aligned, used_teacher_layers=pairing)
        self.teacher_of = pairing


def skip_map(students: int, teachers: int) -> list[int]:
    """Return which teacher layer each student layer is paired with by hand: the last with the last, evenly below.

    Args:
        students: S >= 1.
        teachers: T >= 1.
    """
    # ceil((s + 1) * T / S) - 1 in whole numbers.
    return [max(-(-(s + 1) * teachers // students) - 1, 0) for s in range(students)]
