"""FitNets (Romero et al., 2015): one hint layer of the student regresses one guiding layer of the teacher."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..errors import ConfigurationError
from ..features.targets import TeacherTargets
from .base import Shape, layer_specs
from .baseline import BaselineLoss
from .positions import regress
from .reduction import squared_error


class FitNetLoss(BaselineLoss):
    """A linear regressor of one student layer is to hit one teacher layer: their mean squared error.

    per_sample[i] = mean over positions n that count and teacher channels c of (W F_s[i, n] + b - F_t[i, n])[c]^2.

    The regressor is one linear map over the channels, the same at every position: on maps a 1x1 convolution. The paper
    regresses through a convolution of whatever kernel brings the maps to one size; here the larger map is pooled
    instead, so that maps, image tokens and text are treated alike. The paper's factor 1/2 and its sum over positions
    and channels are replaced by the mean, for which the default weight was published.

    Features are (B, C, H, W) or (B, N, C), the loss of each sample is (B).

    Args:
        student_shapes: One (C, H, W), (tokens, C) or `FeatureSpec` for each of the S student layers.
        teacher_shapes: The same for each of the T teacher layers.
        tokens_aligned: Whether position n of both models stands for the same input.
        hint_layer: Positions of the compared layers in `student_shapes` and `teacher_shapes`, negative ones from the
            end; None for the middle of both, (S // 2, T // 2).

    Attributes:
        hint_layer: The positions, from the front.
        regressor: The linear map from the student layer's channels to the teacher layer's.

    Raises:
        InputError: When there is no layer, or a shape is neither a map nor tokens.
        ConfigurationError: When there is no layer at a position of `hint_layer`.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, the loss of the hints. Weight, mean and
        middle layer: Tian et al., "Contrastive Representation Distillation", ICLR 2020, whose comparison uses 100 and
        the second of three blocks.
    """

    default_weight: float = 100.0

    def __init__(
        self,
        student_shapes: Sequence[Shape],
        teacher_shapes: Sequence[Shape],
        *,
        tokens_aligned: bool = True,
        hint_layer: tuple[int, int] | None = None,
    ):
        students, teachers = layer_specs(student_shapes, "student"), layer_specs(teacher_shapes, "teacher")
        counts = len(students), len(teachers)
        s, t = (counts[0] // 2, counts[1] // 2) if hint_layer is None else _checked(hint_layer, counts)
        super().__init__(students, teachers, tokens_aligned=tokens_aligned, used_teacher_layers=[t])
        self.hint_layer = (s, t)
        self.regressor = nn.Linear(students[s].channels, teachers[t].channels)

    def per_sample(
        self, student_features: Sequence[Tensor], targets: TeacherTargets, student_mask: Tensor | None
    ) -> Tensor:
        """Return the mean squared error of each sample (B); see `BaselineLoss.per_sample`."""
        student, target, mask = self.positions(student_features, targets, *self.hint_layer, student_mask)
        return squared_error(regress(self.regressor, student, mask), target, mask)


def _checked(hint_layer: tuple[int, int], counts: tuple[int, int]) -> tuple[int, int]:
    """Return the two positions counted from the front."""
    if len(hint_layer) != 2 or not all(-n <= layer < n for layer, n in zip(hint_layer, counts, strict=True)):
        raise ConfigurationError(
            "There is no layer at a position of hint_layer",
            received=f"hint_layer={hint_layer} for {counts[0]} student and {counts[1]} teacher layers",
            expected=f"a student position from 0 to {counts[0] - 1} and a teacher position from 0 to "
            f"{counts[1] - 1}, or negative ones from the end",
            todo="correct hint_layer, or leave it out to compare the middle layers",
        )
    return hint_layer[0] % counts[0], hint_layer[1] % counts[1]
