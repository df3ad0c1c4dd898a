"""Attention transfer (Zagoruyko and Komodakis, 2017): the student learns where the teacher is active."""

from itertools import compress, starmap

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigurationError
from ..features.geometry import Alignment
from ..features.layers import FeatureSpec
from ..features.precision import at_least_float32
from .baseline import BaselineBatch, SkipMapLoss
from .positions import masked_mean, zero_masked


class ATLoss(SkipMapLoss):
    """The squared difference of attention maps between each student layer and the teacher layer at its depth.

    per_sample[i] = sum over pairs (s, t) of the mean over positions n that count of (q_s[i, n] - q_t[i, n])^2, with q
    the attention map of a layer: the mean over channels of squared activations, scaled to unit length over the
    positions that count. Pairs are those of `skip_map`; they are summed, as in the published code, which the default
    weight belongs to.

    A pair that shares a single position (other tokenizations, vectors, maps of one cell) is left out: its map is
    always 1. Raises `ConfigurationError` where none is left. There are no parameters, and the models need not share
    their width.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, the activation-based loss, with
        the map F^2_sum (its scale cancels) and the mean square of the published code. Weight: Tian et al.,
        "Contrastive Representation Distillation", ICLR 2020.
    """

    default_weight = 1000.0

    def choose_pairs(self, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the pairs that share more than one position; raise `ConfigurationError` for none."""
        layers = [(self.student_specs[s], self.teacher_specs[t]) for s, t in pairs]
        shared = [not _share_one(*pair, self.tokens_aligned) for pair in layers]
        if any(shared):
            return list(compress(pairs, shared))
        named = (f"{student.name} ({student.kind}) with {teacher.name}" for student, teacher in layers)
        raise ConfigurationError(
            "Attention transfer compares where layers are active, and no pair of layers shares positions",
            received=f"pairs that share one position only: {', '.join(named)}",
            expected="a pair of maps or image tokens, or of token sequences of one tokenization",
            todo="choose other layers with student_layers / teacher_layers, or another method",
        )

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the sum over pairs of each sample's mean (B)."""
        losses = []
        for student, target, mask in starmap(batch.pair, self.pairs):
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
