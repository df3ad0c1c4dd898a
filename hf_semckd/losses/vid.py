"""Variational information distillation (Ahn et al., 2019): a student layer predicts a Gaussian of its target."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features.precision import at_least_float32
from .base import Shape
from .baseline import BaselineBatch, SkipMapLoss
from .positions import regress
from .reduction import masked_mean

INITIAL_VARIANCE, SMALLEST_VARIANCE = 5.0, 1e-5


class VIDLoss(SkipMapLoss):
    """The negative log-likelihood of the teacher's layers under Gaussians whose means the student's layers predict.

    per_sample[i] = sum over student layers s of the mean over positions n that count and teacher channels c of
    ((mu_s(F_s[i, n]) - F_t(s)[i, n])[c]^2 / var_s[c] + log var_s[c]) / 2, where t(s) is `skip_map`. Its negative
    bounds the mutual information of both layers from below, up to a constant. It may be negative.

    Attributes:
        gaussian: One `GaussianRegressor` per student layer.

    Source: Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019, section 2: the
        Gaussian with a variance for each channel. The sum over pairs, the mean within one and the weight 1 are those
        of Tian et al., "Contrastive Representation Distillation", ICLR 2020, with code of the authors.
    """

    default_weight: float = 1.0

    def __init__(
        self, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape], *, tokens_aligned: bool = True
    ):
        super().__init__(student_shapes, teacher_shapes, tokens_aligned=tokens_aligned)
        self.gaussian = nn.ModuleList(
            GaussianRegressor(spec.channels, self.teacher_specs[t].channels)
            for spec, t in zip(self.student_specs, self.teacher_of, strict=True)
        )

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the sum over pairs of each sample's mean (B)."""
        pairs = zip(self.teacher_of, self.gaussian, strict=True)
        return torch.stack([gaussian(*batch.pair(s, t)) for s, (t, gaussian) in enumerate(pairs)]).sum(0)


class GaussianRegressor(nn.Module):
    """A Gaussian over teacher channels: its mean is a network of the student's, its variance one number per channel.

    Args:
        student_channels: C_s.
        teacher_channels: C_t.

    Attributes:
        mean: Three linear maps C_s, C_t, C_t, C_t over channels (1x1 convolutions) without bias, ReLU between.
        raw_variance: (C_t), softplus of which is the variance; 5 at the start.

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
        """Return the mean negative log-likelihood of each sample (B), without the constant log(2 pi) / 2.

        Args:
            tokens: (B, N, C_s).
            target: (B, N, C_t).
            mask: (B, N); positions with 0 do not count and get no gradient, whatever they hold.
        """
        difference = at_least_float32(regress(self.mean, tokens, mask)) - target
        if mask is not None:
            difference = difference.masked_fill(mask.unsqueeze(-1) == 0, 0.0)
        variance = self.variance()
        return masked_mean(0.5 * (difference.square() / variance + variance.log()).mean(-1), mask)
