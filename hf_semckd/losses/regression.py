"""Regression of the teacher's layers by the student's, through projections that are trained where widths differ."""

import math
from collections.abc import Callable
from itertools import starmap

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..features.geometry import fitting_mask
from ..features.layers import FeatureSpec
from ..features.precision import at_least_float32, smallest_length, unit_vectors
from .base import FeatureLoss, Shapes
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
        middle layer: Tian et al. (ICLR 2020), whose comparison uses the second of three blocks.
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
        hint = (counts[0] // 2, counts[1] // 2) if hint_layer is None else hint_layer
        if len(hint) != 2 or not all(-n <= layer < n for layer, n in zip(hint, counts, strict=True)):
            raise ConfigurationError(
                "There is no layer at a position of hint_layer",
                received=f"hint_layer={hint_layer} for {counts[0]} student and {counts[1]} teacher layers",
                expected=f"a student position from 0 to {counts[0] - 1} and a teacher position from 0 to "
                f"{counts[1] - 1}, or negative ones from the end",
                todo="correct hint_layer, or leave it out to compare the middle layers",
            )
        s, t = self.hint_layer = hint[0] % counts[0], hint[1] % counts[1]
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

    Source: Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019, sections 2 and
        3: the Gaussian with a variance for each channel. The sum over pairs, the mean within one and the weight are
        those of Tian et al. (ICLR 2020), with code of the authors.
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

    The network has three linear maps over channels (1x1 convolutions) without bias, ReLU between, sized as in the
    authors' code; the variance is softplus of `raw_variance` (C_t), 5 at the start.
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


class PKDLoss(SkipMapLoss):
    """The squared difference of the normalized first tokens (CLS) of student layers and teacher layers at their depth.

    total = mean over samples, pairs of layers and channels of (s / |s| - t / |t|)^2, where s is the first token of a
    student layer and t that of its teacher layer in `skip_map`. The last student layer does not take part: the logits
    already train it. This is the average of the published code, which the published weights belong to; the paper
    writes the sum over layers and channels. Where widths differ, which the paper does not have, a linear layer
    projects the student's token to the teacher's. Positions need not correspond: the first token stands for the whole.

    Raises `ConfigurationError` for a single student layer, or a layer without a first token: a map, or patches alone.

    Source: Patient Knowledge Distillation for BERT Model Compression (Sun et al., 2019), section 3.2: the patient loss
        L_PT with the strategy PKD-Skip; 100 is one of the weights searched there.
    """

    default_weight = 100.0

    def __init__(self, student_shapes: Shapes, teacher_shapes: Shapes, *, tokens_aligned: bool = True):
        super().__init__(student_shapes, teacher_shapes, tokens_aligned=tokens_aligned)
        projections = (nn.Identity() if own == theirs else nn.Linear(own, theirs) for own, theirs in self.widths)
        self.projection = nn.ModuleList(projections)

    def choose_pairs(self, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return all pairs but the last; raise `ConfigurationError` for none, or a layer without a first token."""
        if len(pairs) < 2:
            raise ConfigurationError(
                "Patient knowledge distillation has no layer to compare",
                received="one student layer",
                expected="at least two: the last does not take part",
                todo="name more layers in student_layers, or leave it out for all",
            )
        for s, t in pairs[:-1]:
            _check_first_token(self.student_specs[s], "student")
            _check_first_token(self.teacher_specs[t], "teacher")
        return pairs[:-1]

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the error of each sample (B), the mean over the pairs; zero for a sample without any token."""
        errors = []
        for (s, t), projection in zip(self.pairs, self.projection, strict=True):
            token, counts = first_token(batch.features[s], batch.student_mask(s))
            target, target_counts = first_token(batch.targets.whole(t), batch.teacher_mask(t))
            if isinstance(projection, nn.Linear):
                token = regress(projection, token)
            own, theirs = (unit_vectors(at_least_float32(x), smallest_length(x.dtype)) for x in (token, target))
            errors.append(torch.where(counts & target_counts, (own - theirs).square().mean(1), 0.0))
        return torch.stack(errors).mean(0)


def first_token(feature: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the first token (B, C) of each sample of (B, N, C) that counts, and whether there is one, (B).

    A feature (B, C) is the token itself. With padding on the left the first token is not at position 0.
    """
    mask = fitting_mask(mask, feature)
    if mask is None:
        counts = torch.ones(len(feature), dtype=torch.bool, device=feature.device)
        return (feature if feature.dim() == 2 else feature[:, 0]), counts
    places = (mask != 0).long().argmax(1)
    tokens = feature.take_along_dim(places[:, None, None], 1).squeeze(1)
    counts = (mask != 0).any(1)
    return tokens.masked_fill(~counts.unsqueeze(1), 0.0), counts


class SimKDLoss(BaselineLoss):
    """The mean squared error of the projected last maps, so that the teacher's classifier fits the student.

    per_sample = mean over positions and channels of (projection(F_s) - F_t)^2, both pooled to the smaller grid.

    The published projector is a stack of convolutions that stays in the student. Here it is one linear map: the
    average of a map, the projection and the teacher's linear classifier are then one linear classifier, which `finish`
    writes into the student's own, so that the student remains a plain model of its class. Both models must have a
    linear classifier on the average of their last map, as most CNNs do; a trainer checks that before training.

    Published weights: 1, with `task_weight=0` and `logit_weight=0`. With others the student's own classifier trains
    too and is replaced at the end, and a resumed run goes on from that. Raises `ConfigurationError` when one of the
    last layers is no map.

    Source: Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022, the feature loss.
    """

    title = "SimKD with a linear projector"
    default_weight = 1.0
    default_used = (-1,)
    reuses_teacher_head = True

    def __init__(self, student_shapes: Shapes, teacher_shapes: Shapes, *, tokens_aligned: bool = True):
        super().__init__(student_shapes, teacher_shapes, tokens_aligned=tokens_aligned)
        for role, spec in (("student", self.student_specs[-1]), ("teacher", self.teacher_specs[-1])):
            if spec.kind != "map":
                raise ConfigurationError(
                    f"SimKD needs a classifier on the average of the last map, and the {role}'s last layer is no map",
                    received=f"layer `{spec.name}` of {spec.length} tokens x {spec.channels}",
                    expected="(channels, height, width)",
                    todo="use it between convolutional networks, or choose another feature loss",
                )
        self.projection = nn.Linear(self.student_specs[-1].channels, self.teacher_specs[-1].channels)

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the mean squared error of each sample (B)."""
        own, theirs, mask = batch.pair(-1, -1)
        return squared_error(regress(self.projection, own, mask), theirs, mask)

    @torch.no_grad()
    def finish(self, student: nn.Module, teacher: nn.Module) -> Callable[[], None]:
        """Write projection and teacher's classifier into the student's classifier; return a function to undo it."""
        own, theirs = find_head(student, "student"), find_head(teacher, "teacher")
        weight = theirs.weight.to(self.projection.weight)
        bias = weight @ self.projection.bias
        if theirs.bias is not None:
            bias = bias + theirs.bias.to(bias)
        before = own.weight.clone(), own.bias.clone()
        own.weight.copy_(weight @ self.projection.weight)
        own.bias.copy_(bias)

        @torch.no_grad()
        def undo() -> None:
            own.weight.copy_(before[0])
            own.bias.copy_(before[1])

        return undo


def find_head(model: nn.Module, role: str) -> nn.Linear:
    """Return the last linear module of a student or teacher (`role`), its classifier.

    Raises `ConfigurationError` when there is none, or the student's has no bias to write to.
    """
    # While training the feature loss is a part of the student, and has linear modules too.
    own = {id(part) for module in model.modules() if isinstance(module, FeatureLoss) for part in module.modules()}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in own]
    if linears and (role == "teacher" or linears[-1].bias is not None):
        return linears[-1]
    raise ConfigurationError(
        f"SimKD reuses the teacher's classifier, and the {role} has no linear one with a bias",
        received=type(model).__name__,
        expected="a model that ends in a linear classifier",
        todo="use another feature loss",
    )


def _check_first_token(spec: FeatureSpec, role: str) -> None:
    if spec.kind == "tokens" and (spec.grid is None or spec.prefix > 0):
        return
    received = "a map" if spec.kind == "map" else "image patches without a token in front"
    raise ConfigurationError(
        "Patient knowledge distillation compares first tokens (CLS), and a layer has none",
        received=f"{received} at {role} layer `{spec.name}`",
        expected="layers (tokens, channels) whose first token stands for the whole",
        todo=f"name other layers in {role}_layers, or choose another method for these models",
    )
