"""Attention transfer (Zagoruyko and Komodakis, 2017): the student learns where the teacher is active."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigurationError
from ..features.geometry import Alignment
from ..features.layers import FeatureSpec
from ..features.precision import at_least_float32
from .base import Shapes, layer_specs
from .baseline import BaselineBatch, BaselineLoss, skip_map
from .reduction import masked_mean, zero_masked


class ATLoss(BaselineLoss):
    """The squared difference of attention maps between each student layer and the teacher layer at its depth.

    per_sample[i] = sum over pairs (s, t) of the mean over positions n that count of (q_s[i, n] - q_t[i, n])^2, with q
    the attention map of a layer: the mean over channels of squared activations, scaled to unit length over the
    positions that count. Pairs are those of `skip_map`; they are summed, as in the published code, which the default
    weight belongs to.

    A pair that shares a single position (other tokenizations, vectors, maps of one cell) is left out: its map is
    always 1. There are no parameters, and the models need not share their width.

    `pairs` are the (student layer, teacher layer) that are compared. Raises `ConfigurationError` for none.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, the activation-based loss, with
        the map F^2_sum (its scale cancels) and the mean square of the published code. Weight: Tian et al.,
        "Contrastive Representation Distillation", ICLR 2020.
    """

    default_weight = 1000.0

    def __init__(self, student_shapes: Shapes, teacher_shapes: Shapes, *, tokens_aligned: bool = True):
        students, teachers = layer_specs(student_shapes, "student"), layer_specs(teacher_shapes, "teacher")
        pairing = list(enumerate(skip_map(len(students), len(teachers))))
        pairs = [(s, t) for s, t in pairing if not _share_one(students[s], teachers[t], tokens_aligned)]
        if not pairs:
            named = (f"{students[s].name} ({students[s].kind}) with {teachers[t].name}" for s, t in pairing)
            raise ConfigurationError(
                "Attention transfer compares where layers are active, and no pair of layers shares positions",
                received=f"pairs that share one position only: {', '.join(named)}",
                expected="a pair of maps or image tokens, or of token sequences of one tokenization",
                todo="choose other layers with student_layers / teacher_layers, or another method",
            )
        super().__init__(students, teachers, tokens_aligned=tokens_aligned, used_teacher_layers=[t for _, t in pairs])
        self.pairs = pairs

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the sum over pairs of each sample's mean (B)."""
        losses = []
        for s, t in self.pairs:
            student, target, mask = batch.pair(s, t)
            difference = attention_map(student, mask) - attention_map(target, mask)
            losses.append(masked_mean(difference.square(), mask))
        return torch.stack(losses).sum(0)


def attention_map(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the activity (B, N) of each position of (B, N, C), a unit row per sample, at least in float32.

    Positions whose mask (B, N) is 0 are zero and get no gradient, whatever they hold.
    """
    return F.normalize(zero_masked(at_least_float32(tokens), mask).square().mean(-1), dim=1)


def _share_one(student: FeatureSpec, teacher: FeatureSpec, tokens_aligned: bool) -> bool:
    """Whether two layers are compared at a single position, where an attention map says nothing."""
    kind = Alignment.of(student, teacher, tokens_aligned).kind
    if kind == "grid" and student.grid is not None and teacher.grid is not None:
        return min(student.grid[0], teacher.grid[0]) * min(student.grid[1], teacher.grid[1]) == 1
    return kind == "mean" or student.length == 1
