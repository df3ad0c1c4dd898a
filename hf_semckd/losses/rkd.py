"""Relational knowledge distillation (Park et al., CVPR 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..features.precision import at_least_float32, full_precision
from .base import Shapes
from .baseline import BaselineBatch, BaselineLoss

# Squared distances up to this are those of identical samples, as in the published code.
EPSILON = 1e-12


class RKDLoss(BaselineLoss):
    """The student's embeddings have the distances and angles of the teacher's.

    total = distance_weight * mean over i, j of l(d_s[i, j] - d_t[i, j])
    + angle_weight * mean over i, j, k of l(a_s[i, j, k] - a_t[i, j, k]), where d are Euclidean distances of
    embeddings, divided by the mean of those that are not zero, a is the cosine of the angle at i between j and k, and
    l the Huber loss. As in the published code, means are taken over all B^2 and B^3 entries.

    There are no parameters, and the models need not share their width. The angles need B^2 * C and B^3 numbers.

    Source: Relational Knowledge Distillation (Park et al., 2019), section 3.2: the equations of the distance-wise loss
        (RKD-D) and of the angle-wise loss (RKD-A); the weights 25 and 50 are those for classification.
    """

    default_weight = 1.0
    default_used = (-1,)

    def __init__(
        self,
        student_shapes: Shapes,
        teacher_shapes: Shapes,
        *,
        tokens_aligned: bool = True,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
    ):
        super().__init__(student_shapes, teacher_shapes, tokens_aligned=tokens_aligned)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the share of each sample (B): its row of distances, and the angles at it."""
        (own, own_angles), (theirs, their_angles) = map(relations, batch.embeddings())
        distances = F.smooth_l1_loss(own, theirs, reduction="none").mean(1)
        angles = F.smooth_l1_loss(own_angles, their_angles, reduction="none").mean((1, 2))
        return self.distance_weight * distances + self.angle_weight * angles


def relations(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distances of every two samples of (B, C) and the cosines of the angles of every three.

    These are (B, B), over the mean of those that are not zero, and (B, B, B), whose first index is the vertex; both at
    least in float32. Identical samples have no direction: their cosines and their gradients are zero.
    """
    rows = at_least_float32(embeddings)
    differences = rows.unsqueeze(0) - rows.unsqueeze(1)
    squares = differences.square().sum(-1)
    apart = squares > EPSILON
    # The root has no gradient at zero: it is taken of ones there, and dropped.
    roots = torch.where(apart, squares, 1.0).sqrt()
    distances = torch.where(apart, roots, 0.0)
    mean = distances.sum() / apart.sum().clamp(min=1)
    directions = torch.where(apart.unsqueeze(-1), differences / roots.unsqueeze(-1), 0.0)
    with full_precision(directions):
        angles = directions @ directions.mT
    return distances / torch.where(mean > 0, mean, 1.0), angles
