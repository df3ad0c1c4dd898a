"""Variational information distillation (Ahn et al., 2019): a student layer predicts a Gaussian of its target."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features.precision import at_least_float32
from .base import Shapes
from .baseline import BaselineBatch, SkipMapLoss
from .positions import regress
from .reduction import masked_mean, zero_masked

INITIAL_VARIANCE, SMALLEST_VARIANCE = 5.0, 1e-5


class VIDLoss(SkipMapLoss):
    """The negative log-likelihood of the teacher's layers under Gaussians whose means the student's layers predict.

    per_sample[i] = sum over student layers s of the mean over positions n that count and teacher channels c of
    ((mu_s(F_s[i, n]) - F_t(s)[i, n])[c]^2 / var_s[c] + log var_s[c]) / 2, where t(s) is `skip_map`. Its negative
    bounds the mutual information of both layers from below, up to a constant. It may be negative.

    Source: Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019, section 2: the
        Gaussian with a variance for each channel. The sum over pairs, the mean within one and the weight 1 are those
        of Tian et al., "Contrastive Representation Distillation", ICLR 2020, with code of the authors.
    """

    default_weight = 1.0

    def __init__(self, student_shapes: Shapes, teacher_shapes: Shapes, *, tokens_aligned: bool = True):
        super().__init__(student_shapes, teacher_shapes, tokens_aligned=tokens_aligned)
        self.gaussian = nn.ModuleList(GaussianRegressor(*widths) for widths in self.widths)

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the sum over pairs of each sample's mean (B)."""
        pairs = zip(self.teacher_of, self.gaussian, strict=True)
        return torch.stack([gaussian(*batch.pair(s, t)) for s, (t, gaussian) in enumerate(pairs)]).sum(0)


class GaussianRegressor(nn.Module):
    """A Gaussian over teacher channels: its mean is a network of the student's, its variance one number per channel.

    The network has three linear maps over channels (1x1 convolutions) without bias, ReLU between; the variance is
    softplus of `raw_variance` (C_t), 5 at the start.

    Source: Ahn et al., 2019, sections 2 and 3; the sizes are those of the authors' code.
    """

    def __init__(self, student_channels: int, teacher_channels: int):
        super().__init__()
        self.mean = nn.Sequential(
            nn.Linear(student_channels, teacher_channels, bias=False),
            nn.ReLU(),
            nn.Linear(teacher_channels, teacher_channels, bias=False),
            nn.ReLU(),
            nn.Linear(teacher_channels, teacher_channels, bias=False),
        )
        start = math.log(math.expm1(INITIAL_VARIANCE - SMALLEST_VARIANCE))
        self.raw_variance = nn.Parameter(torch.full((teacher_channels,), start))

    def variance(self) -> Tensor:
        """Return the variance of each channel (C_t), at least in float32 and never below 1e-5."""
        return F.softplus(at_least_float32(self.raw_variance)) + SMALLEST_VARIANCE

    def forward(self, tokens: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean negative log-likelihood (B) of target (B, N, C_t), without the constant log(2 pi) / 2."""
        difference = zero_masked(at_least_float32(regress(self.mean, tokens, mask)) - target, mask)
        variance = self.variance()
        return masked_mean(0.5 * (difference.square() / variance + variance.log()).mean(-1), mask)
