"""Correlation congruence (Peng et al., ICCV 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features.precision import at_least_float32, full_precision
from ..features.targets import TeacherTargets
from .base import Shape
from .baseline import BaselineLoss
from .positions import regress

# The published kernel: its width, and where its Taylor series ends.
GAMMA = 0.4

ORDER = 2


class CCLoss(BaselineLoss):
    """The student's samples correlate with one another as the teacher's do.

    total = 1 / B^2 * sum over i, j of (k(s_i, s_j) - k(t_i, t_j))^2, where s and t are embeddings, projected to one
    width by a linear layer each and normalized to unit length, and k is the Gaussian kernel exp(-gamma * |x - y|^2) by
    its Taylor series in <x, y> up to the second power.

    This is the paper's equation. The code of the benchmark of contrastive representation distillation, from which the
    weight comes, multiplies the absolute errors of neighbors in the batch instead, which depends on its order.
    Both linear layers are trained, as there; the teacher itself is not.

    Args:
        student_shapes: One (C, H, W), (tokens, C) or `FeatureSpec` for each student layer; the last is compared.
        teacher_shapes: The same for each teacher layer.
        tokens_aligned: Whether position n of both models stands for the same input; it makes no difference here.
        embedding_size: Width of both projections.

    Attributes:
        student_head, teacher_head: The linear layers.

    Raises:
        InputError: When there is no layer, or a shape is neither a map nor tokens.

    Source: Correlation Congruence for Knowledge Distillation (Peng et al., 2019), section 3: the equation of the
    correlation congruence loss L_CC, with the Taylor series of the Gaussian RBF correlation; gamma 0.4 and order 2 are
    the paper's, the width and the weight 0.02 those of the benchmark (Tian et al., 2020).
    """

    default_weight: float = 0.02
    default_used: ClassVar[Sequence[int]] = (-1,)

    def __init__(
        self,
        student_shapes: Sequence[Shape],
        teacher_shapes: Sequence[Shape],
        *,
        tokens_aligned: bool = True,
        embedding_size: int = 256,
    ):
        super().__init__(student_shapes, teacher_shapes, tokens_aligned=tokens_aligned)
        self.student_head = nn.Linear(self.student_specs[-1].channels, embedding_size)
        self.teacher_head = nn.Linear(self.teacher_specs[-1].channels, embedding_size)

    def per_sample(
        self, student_features: Sequence[Tensor], targets: TeacherTargets, student_mask: Tensor | None
    ) -> Tensor:
        """Return the mean squared error of each sample's row of correlations (B); see `BaselineLoss.per_sample`."""
        student, teacher = self.embeddings(student_features, targets, student_mask)
        own = gaussian_correlations(regress(self.student_head, student))
        theirs = gaussian_correlations(regress(self.teacher_head, teacher))
        return (own - theirs).square().mean(1)


def gaussian_correlations(embeddings: Tensor) -> Tensor:
    """Return the Gaussian kernel of every two samples on the unit sphere, by its Taylor series.

    exp(-gamma * |x - y|^2) = exp(-2 gamma) * exp(2 gamma <x, y>) for vectors of unit length.

    Args:
        embeddings: (B, C); they are normalized here.

    Returns:
        (B, B), at least in float32.
    """
    rows = F.normalize(at_least_float32(embeddings), dim=1)
    with full_precision(rows):
        products = 2 * GAMMA * (rows @ rows.T)
    terms = [products**power / math.factorial(power) for power in range(ORDER + 1)]
    return math.exp(-2 * GAMMA) * torch.stack(terms).sum(0)
