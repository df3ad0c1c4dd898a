"""Similarity-preserving distillation (Tung and Mori, 2019)."""

import torch.nn.functional as F
from torch import Tensor

from ..features.geometry import fitting_mask
from .baseline import BaselineBatch, BaselineLoss
from .similarity import similarity_matrix


class SPLoss(BaselineLoss):
    """The squared difference of the last layers' similarity matrices.

    total = |G_t - G_s|^2 / B^2 with G the matrix of inner products of the flattened features, each row scaled to unit
    length. per_sample[i] is the share of row i, times B, so that the mean is the total: it depends on the rest of the
    batch, and micro-batches give other values than the batch they make up. For a batch of one it is zero.

    There are no parameters; the models need share neither width nor positions.

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, section 3, for one pair of
        layers. Weight: Tian et al., "Contrastive Representation Distillation", ICLR 2020.
    """

    default_weight = 3000.0
    default_used = (-1,)

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the squared distance of each row (B) over the batch size."""
        used = self.used_teacher_layers[0]
        student = unit_rows(batch.features[-1], batch.student_mask(-1))
        return (unit_rows(batch.targets.whole(used), batch.teacher_mask(used)) - student).square().mean(1)


def unit_rows(feature: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the similarities (B, B) of the samples of (B, ...), each row of unit length, at least in float32."""
    return F.normalize(similarity_matrix(feature, fitting_mask(mask, feature)), dim=1)
