"""Regression of the teacher's layers: FitNets of one, the uniform layer map of all, VID with a variance of its own."""

import math
from itertools import starmap

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..features.precision import at_least_float32
from .base import Shapes
from .baseline import BaselineBatch, BaselineLoss, SkipMapLoss
from .positions import masked_mean, regress, squared_error, zero_masked

# The variance that VID starts with, and what is added to every one.
INITIAL_VARIANCE, SMALLEST_VARIANCE = 5.0, 1e-5


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
        super().__init__(student_shapes, teacher_shapes, tokens_aligned=tokens_aligned)
        counts = len(self.student_specs), len(self.teacher_specs)
        s, t = (counts[0] // 2, counts[1] // 2) if hint_layer is None else _checked(hint_layer, counts)
        self.hint_layer = s, t
        self.use_teacher_layers([t])
        self.regressor = nn.Linear(self.student_specs[s].channels, self.teacher_specs[t].channels)

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the mean squared error of each sample (B)."""
        student, target, mask = batch.pair(*self.hint_layer)
        return squared_error(regress(self.regressor, student, mask), target, mask)


class LayerMapLoss(SkipMapLoss):
    """The mean squared error of every student layer, linearly projected, against the teacher layer at its depth.

    per_sample[i] = mean over student layers s, positions n that count and teacher channels c of
    (W_s F_s[i, n] + b_s - F_t(s)[i, n])[c]^2, where t(s) is `skip_map`.

    TinyBERT shares one projection among all layers; here each has its own, as layers may differ in width. The mean
    over student layers instead of the paper's sum keeps the size of the loss independent of the student's depth.

    Source: Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", Findings of EMNLP 2020,
        the loss of the hidden states, with the uniform layer mapping; the weight of a layer is 1 there.
    """

    default_weight = 1.0

    def __init__(self, student_shapes: Shapes, teacher_shapes: Shapes, *, tokens_aligned: bool = True):
        super().__init__(student_shapes, teacher_shapes, tokens_aligned=tokens_aligned)
        self.projection = nn.ModuleList(nn.Linear(*widths) for widths in self.widths)

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the mean over student layers of each sample's error (B)."""
        layers = zip(self.projection, starmap(batch.pair, self.pairs), strict=True)
        errors = [squared_error(regress(linear, own, mask), target, mask) for linear, (own, target, mask) in layers]
        return torch.stack(errors).mean(0)


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
        pairs = zip(self.gaussian, starmap(batch.pair, self.pairs), strict=True)
        return torch.stack([gaussian(*pair) for gaussian, pair in pairs]).sum(0)


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
