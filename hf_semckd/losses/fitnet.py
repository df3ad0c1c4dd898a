"""FitNets (Romero et al., 2015): one hint layer of the student regresses one guiding layer of the teacher."""

from torch import Tensor, nn

from ..errors import ConfigurationError
from .base import Shapes
from .baseline import BaselineBatch, BaselineLoss
from .positions import regress
from .reduction import squared_error


class FitNetLoss(BaselineLoss):
    """The mean squared error of one student layer, linearly regressed, against one teacher layer.

    per_sample[i] = mean over positions n that count and teacher channels c of (W F_s[i, n] + b - F_t[i, n])[c]^2.

    Departures from the paper: the regressor is linear over the channels (a 1x1 convolution on maps) with the larger
    map pooled, where the paper's convolution changes the size; and the mean replaces the factor 1/2 and the sum over
    positions and channels, as in the comparison that the default weight comes from.

    `hint_layer` are the positions of the student's and the teacher's layer, negative ones from the end; None for the
    middle of both, (S // 2, T // 2). Raises `ConfigurationError` when there is no layer at one of them.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, the loss of the hints. Weight, mean and
        middle layer: Tian et al., "Contrastive Representation Distillation", ICLR 2020, whose comparison uses 100 and
        the second of three blocks.
    """

    default_weight = 100.0

    def __init__(
        self,
        student_shapes: Shapes,
        teacher_shapes: Shapes,
        *,
        tokens_aligned: bool = True,
        hint_layer: tuple[int, int] | None = None,
    ):
        counts = max(len(student_shapes), 1), max(len(teacher_shapes), 1)
        s, t = (counts[0] // 2, counts[1] // 2) if hint_layer is None else _checked(hint_layer, counts)
        super().__init__(student_shapes, teacher_shapes, tokens_aligned=tokens_aligned, used_teacher_layers=[t])
        self.hint_layer = (s, t)
        self.regressor = nn.Linear(self.student_specs[s].channels, self.teacher_specs[t].channels)

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the mean squared error of each sample (B)."""
        student, target, mask = batch.pair(*self.hint_layer)
        return squared_error(regress(self.regressor, student, mask), target, mask)


def _checked(hint_layer: tuple[int, int], counts: tuple[int, int]) -> tuple[int, int]:
    if len(hint_layer) != 2 or not all(-n <= layer < n for layer, n in zip(hint_layer, counts, strict=True)):
        raise ConfigurationError(
            "There is no layer at a position of hint_layer",
            received=f"hint_layer={hint_layer} for {counts[0]} student and {counts[1]} teacher layers",
            expected=f"a student position from 0 to {counts[0] - 1} and a teacher position from 0 to "
            f"{counts[1] - 1}, or negative ones from the end",
            todo="correct hint_layer, or leave it out to compare the middle layers",
        )
    return hint_layer[0] % counts[0], hint_layer[1] % counts[1]
