"""Correlation congruence (Peng et al., ICCV 2019)."""

import math

import torch
from torch import Tensor, nn

from .base import Shapes
from .baseline import BaselineBatch, BaselineLoss
from .positions import regress
from .similarity import cosine_matrix

# The width of the published kernel, and the last power of its Taylor series.
GAMMA, ORDER = 0.4, 2


class CCLoss(BaselineLoss):
    """The squared difference of the correlations between samples.

    total = 1 / B^2 * sum over i, j of (k(s_i, s_j) - k(t_i, t_j))^2, where s and t are embeddings, projected to one
    width by a linear layer each and normalized to unit length, and k is the Gaussian kernel exp(-gamma * |x - y|^2) by
    its Taylor series in <x, y> up to the second power.

    This is the paper's equation. The code of Tian et al., from which the weight comes, multiplies the absolute errors
    of neighbors in the batch instead, which depends on its order. Both linear layers are trained, as there.

    Source: Correlation Congruence for Knowledge Distillation (Peng et al., 2019), section 3: the equation of the
        correlation congruence loss L_CC, with the Taylor series of the Gaussian RBF correlation; gamma 0.4 and order 2
        are the paper's, the width and the weight 0.02 those of Tian et al., "Contrastive Representation Distillation",
        ICLR 2020.
    """

    default_weight = 0.02
    default_used = (-1,)

    def __init__(
        self, student_shapes: Shapes, teacher_shapes: Shapes, *, tokens_aligned: bool = True, embedding_size: int = 256
    ):
        super().__init__(student_shapes, teacher_shapes, tokens_aligned=tokens_aligned)
        self.student_head = nn.Linear(self.student_specs[-1].channels, embedding_size)
        self.teacher_head = nn.Linear(self.teacher_specs[-1].channels, embedding_size)

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the mean squared error of each sample's row of correlations (B)."""
        student, teacher = batch.embeddings()
        own = gaussian_correlations(regress(self.student_head, student))
        theirs = gaussian_correlations(regress(self.teacher_head, teacher))
        return (own - theirs).square().mean(1)


def gaussian_correlations(embeddings: Tensor) -> Tensor:
    """Return the Gaussian kernel (B, B) of every two samples of (B, C), scaled to unit length, by its Taylor series.

    exp(-gamma * |x - y|^2) = exp(-2 gamma) * exp(2 gamma <x, y>) for vectors of unit length. At least in float32.
    """
    products = 2 * GAMMA * cosine_matrix(embeddings)
    terms = [products**power / math.factorial(power) for power in range(ORDER + 1)]
    return math.exp(-2 * GAMMA) * torch.stack(terms).sum(0)
