"""The losses that SemCKD is compared with: the layers they compare and what they keep of the teacher."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..features.geometry import Alignment, Average, compared_positions, embedding
from ..features.layers import FeatureSpec
from ..features.targets import Features, LayerMasks, TeacherTargets, layer_mask
from .base import FeatureLoss, FeatureLossOutput, Shapes, layer_specs


@dataclass(frozen=True)
class BaselineBatch:
    """A batch: the student's features and the masks of their tokens, the whole outputs of the used teacher layers."""

    features: Features
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
        student = embedding(self.features[-1], self.student_specs[-1], Average(self.student_mask(-1)))
        teacher = embedding(self.targets.whole(-1), self.teacher_specs[-1], Average(self.teacher_mask(-1)))
        return student, teacher


class BaselineLoss(FeatureLoss):
    """A loss on some of the layers, which keeps only these of the teacher. A subclass implements `per_sample`.

    All baselines take these arguments; where layers of different sizes are compared, see `BaselineBatch.pair`.

    Args:
        student_shapes, teacher_shapes: One (C, H, W), (tokens, C) or `FeatureSpec` per layer.
        tokens_aligned: Whether position n of both models stands for the same input.

    Attributes:
        default_used: Positions of the teacher layers that the method uses, negative ones from the end; None for all.
            Where they depend on the layers, the constructor calls `use_teacher_layers`.

    Raises `InputError` when there is no layer, or a shape is neither a map nor tokens.
    """

    default_used: ClassVar[Sequence[int] | None] = None

    def __init__(self, student_shapes: Shapes, teacher_shapes: Shapes, *, tokens_aligned: bool = True):
        super().__init__()
        self.student_specs = layer_specs(student_shapes, "student")
        self.teacher_specs = layer_specs(teacher_shapes, "teacher")
        self.tokens_aligned = tokens_aligned
        self.use_teacher_layers(range(len(self.teacher_specs)) if self.default_used is None else self.default_used)

    def use_teacher_layers(self, layers: Iterable[int]) -> None:
        """Keep the teacher layers at these positions, negative ones from the end, in place of `default_used`."""
        self.used_teacher_layers = sorted({layer % len(self.teacher_specs) for layer in layers})
        self.kept = f"whole features of the layers at {self.used_teacher_layers}"

    def compare(
        self, student_features: Features, targets: TeacherTargets, student_mask: LayerMasks
    ) -> FeatureLossOutput:
        """Return `per_sample` and its mean."""
        specs = self.student_specs, self.teacher_specs
        losses = self.per_sample(BaselineBatch(student_features, student_mask, targets, *specs, self.tokens_aligned))
        return FeatureLossOutput(losses.mean(), losses)

    @abstractmethod
    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the loss of each sample (B), the `per_sample` of the class's equation."""

    def select(self, features: Features, mask: LayerMasks = None, phase: Tensor | None = None) -> TeacherTargets:
        """Return the teacher layers that are used; see `FeatureLoss.select`."""
        return TeacherTargets.of_whole(features, mask, self.used_teacher_layers)


class SkipMapLoss(BaselineLoss):
    """A baseline that compares student layers with the teacher layers at their depth.

    `pairs` are the (student layer, teacher layer) that `choose_pairs` keeps of `skip_map`; `widths` their channels.
    """

    def __init__(self, student_shapes: Shapes, teacher_shapes: Shapes, *, tokens_aligned: bool = True):
        super().__init__(student_shapes, teacher_shapes, tokens_aligned=tokens_aligned)
        self.pairs = self.choose_pairs(list(enumerate(skip_map(len(self.student_specs), len(self.teacher_specs)))))
        self.use_teacher_layers(t for _, t in self.pairs)
        self.widths = [(self.student_specs[s].channels, self.teacher_specs[t].channels) for s, t in self.pairs]

    def choose_pairs(self, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the pairs that the method compares, here all, or raise `ConfigurationError` where there is none."""
        return pairs


def skip_map(students: int, teachers: int) -> list[int]:
    """Return the teacher layer of each of S student layers in the uniform layer map: last to last, evenly below."""
    # ceil((s + 1) * T / S) - 1 in whole numbers.
    return [max(-(-(s + 1) * teachers // students) - 1, 0) for s in range(students)]
