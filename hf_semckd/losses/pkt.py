"""Probabilistic knowledge transfer (Passalis & Tefas, ECCV 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..features.precision import at_least_float32, full_precision
from ..features.targets import TeacherTargets
from .baseline import BaselineLoss

# The published code adds it to both probabilities.
EPSILON = 1e-7


class PKTLoss(BaselineLoss):
    """The student's samples are neighbors of one another with the probabilities that the teacher gives them.

    p[i, j] = k(x_i, x_j) / sum over l of k(x_i, x_l), where k is the cosine of two embeddings, shifted to [0, 1];
    total = 1 / B^2 * sum over i, j of p_t[i, j] * log(p_t[i, j] / p_s[i, j]).

    As in the published code, the sum is averaged over all B^2 entries, and each sample is its own neighbor too. It
    has no parameters and takes any widths.

    Args:
        student_shapes: One (C, H, W), (tokens, C) or `FeatureSpec` for each student layer; the last is compared.
        teacher_shapes: The same for each teacher layer.
        tokens_aligned: Whether position n of both models stands for the same input; it makes no difference here.

    Raises:
        InputError: When there is no layer, or a shape is neither a map nor tokens.

    Source: Learning Deep Representations with Probabilistic Knowledge Transfer (Passalis & Tefas, 2018), section 3:
    the equations of the conditional probabilities with the cosine kernel, and of their Kullback-Leibler divergence;
    the weight 30000 is that of the benchmark of contrastive representation distillation (Tian et al., 2020).
    """

    default_weight: float = 30000.0
    default_used: ClassVar[Sequence[int]] = (-1,)

    def per_sample(
        self, student_features: Sequence[Tensor], targets: TeacherTargets, student_mask: Tensor | None
    ) -> Tensor:
        """Return the mean over each sample's row of the B x B divergences (B); see `BaselineLoss.per_sample`."""
        student, teacher = self.embeddings(student_features, targets, student_mask)
        own, theirs = neighbor_probabilities(student), neighbor_probabilities(teacher)
        return (theirs * ((theirs + EPSILON).log() - (own + EPSILON).log())).mean(1)


def neighbor_probabilities(embeddings: Tensor) -> Tensor:
    """Return how probable each sample is as a neighbor of each other one, by shifted cosines.

    Args:
        embeddings: (B, C).

    Returns:
        (B, B), at least in float32; rows sum to one.
    """
    rows = F.normalize(at_least_float32(embeddings), dim=1)
    with full_precision(rows):
        affinities = (rows @ rows.T + 1) / 2
    return affinities / affinities.sum(1, keepdim=True)
