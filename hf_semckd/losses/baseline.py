"""The losses that SemCKD is compared with: the layers they compare and what they keep of the teacher."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..features.geometry import Alignment, Average, embedding
from ..features.layers import FeatureSpec
from ..features.targets import LayerMasks, TeacherTargets, layer_mask
from .base import FeatureLoss, FeatureLossOutput, Shapes, layer_specs
from .positions import compared_positions


@dataclass(frozen=True)
class BaselineBatch:
    """A batch: the student's features and the masks of their tokens, the whole outputs of the used teacher layers."""

    features: Sequence[Tensor]
    masks: LayerMasks
    targets: TeacherTargets
    student_specs: Sequence[FeatureSpec]
    teacher_specs: Sequence[FeatureSpec]
    tokens_aligned: bool

    def student_mask(self, s: int) -> Tensor | None:
        """Return the mask (B, N) of the tokens of student layer s."""
        return layer_mask(self.masks, s)

    def teacher_mask(self, t: int) -> Tensor | None:
        """Return the mask (B, N) of the tokens of teacher layer t."""
        return layer_mask(self.targets.mask, t)

    def pair(self, s: int, t: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return student layer s and teacher layer t as tokens (B, N, C) at the same positions, and their mask (B, N).

        Maps and image tokens of different sizes are pooled to the smaller grid, row by row; sequences that do not
        correspond position by position are averaged to one.
        """
        own, theirs = self.student_specs[s], self.teacher_specs[t]
        alignment = Alignment.of(own, theirs, self.tokens_aligned)
        student, teacher = (self.features[s], own), (self.targets.whole(t), theirs)
        return compared_positions(alignment, student, teacher, self.student_mask(s), self.teacher_mask(t))

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Return the embeddings (B, C_s) and (B, C_t) of both models' last layers; see `geometry.embedding`."""
        last = len(self.teacher_specs) - 1
        return (
            embedding(self.features[-1], self.student_specs[-1], Average(self.student_mask(-1))),
            embedding(self.targets.whole(last), self.teacher_specs[last], Average(self.teacher_mask(last))),
        )


class BaselineLoss(FeatureLoss):
    """A loss on some of the layers, which keeps only these of the teacher. A subclass implements `per_sample`.

    All baselines take these arguments; where layers of different sizes are compared, see `BaselineBatch.pair`.

    Args:
        student_shapes, teacher_shapes: One (C, H, W), (tokens, C) or `FeatureSpec` per layer.
        tokens_aligned: Whether position n of both models stands for the same input.
        used_teacher_layers: Positions in `teacher_shapes`, negative ones from the end; None for `default_used`,
            the layers that the method uses (None: all).

    Raises `InputError` when there is no layer, or a shape is neither a map nor tokens.
    """

    default_used: ClassVar[Sequence[int] | None] = None

    def __init__(
        self,
        student_shapes: Shapes,
        teacher_shapes: Shapes,
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
        self.used_teacher_layers = sorted({layer % count for layer in (range(count) if used is None else used)})
        self.kept = f"whole features of the layers at {self.used_teacher_layers}"

    def compare(
        self, student_features: Sequence[Tensor], targets: TeacherTargets, student_mask: LayerMasks
    ) -> FeatureLossOutput:
        """Return `per_sample` and its mean."""
        specs = self.student_specs, self.teacher_specs
        losses = self.per_sample(BaselineBatch(student_features, student_mask, targets, *specs, self.tokens_aligned))
        return FeatureLossOutput(losses.mean(), losses)

    @abstractmethod
    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the loss of each sample (B), the `per_sample` of the class's equation."""

    def select(
        self, features: Sequence[Tensor], mask: LayerMasks = None, phase: Tensor | None = None
    ) -> TeacherTargets:
        """Return the teacher layers that are used; see `FeatureLoss.select`."""
        return TeacherTargets.of_whole(features, mask, self.used_teacher_layers)


class SkipMapLoss(BaselineLoss):
    """A baseline that pairs every student layer with the teacher layer at its depth.

    `teacher_of` holds the teacher layer of each student layer, see `skip_map`; `widths` the channels of both.
    """

    def __init__(self, student_shapes: Shapes, teacher_shapes: Shapes, *, tokens_aligned: bool = True):
        # Without a layer there is no map; the base class refuses that.
        pairing = skip_map(max(len(student_shapes), 1), max(len(teacher_shapes), 1))
        super().__init__(student_shapes, teacher_shapes, tokens_aligned=tokens_aligned, used_teacher_layers=pairing)
        self.teacher_of = pairing
        pairs = zip(self.student_specs, pairing, strict=True)
        self.widths = [(spec.channels, self.teacher_specs[t].channels) for spec, t in pairs]


def skip_map(students: int, teachers: int) -> list[int]:
    """Return the teacher layer of each of S student layers in the uniform layer map: last to last, evenly below."""
    # ceil((s + 1) * T / S) - 1 in whole numbers.
    return [max(-(-(s + 1) * teachers // students) - 1, 0) for s in range(students)]
