"""Similarity-preserving distillation (Tung and Mori, 2019): what is alike for the teacher is to be for the student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..features.geometry import fitting_mask
from ..features.targets import TeacherTargets
from .baseline import BaselineLoss
from .similarity import similarity_matrix


class SPLoss(BaselineLoss):
    """The last layers of both models are to see the same similarities among the samples of a batch.

    total = |G_t - G_s|^2 / B^2 with G the matrix of inner products of the flattened features, each row scaled to unit
    length. per_sample[i] is what row i adds, times B, so that the mean is the total: it depends on the rest of the
    batch by its nature, and micro-batches give other values than the batch they make up. A batch of one has nothing to
    compare: its loss is zero.

    The models need share neither width nor positions. The loss has no parameters.

    Features are (B, C, H, W) or (B, N, C), the loss of each sample is (B).

    Args:
        student_shapes: One (C, H, W), (tokens, C) or `FeatureSpec` for each student layer; the last is compared.
        teacher_shapes: The same for each teacher layer.
        tokens_aligned: Whether position n of both models stands for the same input; makes no difference.

    Raises:
        InputError: When there is no layer, or a shape is neither a map nor tokens.

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, section 3, for one pair of
        layers. Weight: Tian et al., "Contrastive Representation Distillation", ICLR 2020.
    """

    default_weight: float = 3000.0
    default_used: ClassVar[Sequence[int]] = (-1,)

    def per_sample(
        self, student_features: Sequence[Tensor], targets: TeacherTargets, student_mask: Tensor | None
    ) -> Tensor:
        """Return the squared distance of each row (B) over the batch size; see `BaselineLoss.per_sample`."""
        target = targets.whole(self.used_teacher_layers[0])
        student = unit_rows(student_features[-1], student_mask)
        return (unit_rows(target, targets.mask) - student).square().mean(1)


def unit_rows(feature: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the similarities of a batch's samples (B, B), each row of unit length, at least in float32.

    Args:
        feature: (B, ...).
        mask: (B, N); tokens with 0 do not take part, whatever they hold.
    """
    return F.normalize(similarity_matrix(feature, fitting_mask(mask, feature)), dim=1)
