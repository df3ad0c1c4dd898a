"""Relations between the samples of a batch in the last layers: SP, PKT, RKD and CC keep those of the teacher."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features.geometry import fitting_mask
from ..features.precision import at_least_float32, full_precision
from .base import Shapes
from .baseline import BaselineBatch, BaselineLoss
from .positions import regress
from .similarity import cosine_matrix, similarity_matrix

# What the published code of PKT adds to both probabilities.
PROBABILITY_OFFSET = 1e-7
# Squared distances up to this are those of identical samples, as in the published code of RKD.
IDENTICAL = 1e-12
# The width of CC's published kernel, and the last power of its Taylor series.
GAMMA, ORDER = 0.4, 2


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
        student = unit_rows(batch.features[-1], batch.student_mask(-1))
        teacher = unit_rows(batch.targets.whole(-1), batch.teacher_mask(-1))
        return (teacher - student).square().mean(1)


def unit_rows(feature: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the similarities (B, B) of the samples of (B, ...), each row of unit length, at least in float32."""
    return F.normalize(similarity_matrix(feature, fitting_mask(mask, feature)), dim=1)


class PKTLoss(BaselineLoss):
    """The divergence of the probabilities with which samples are one another's neighbors.

    total = 1 / B^2 * sum over i, j of p_t[i, j] * log(p_t[i, j] / p_s[i, j]), where p[i, j] = k(x_i, x_j) / sum over l
    of k(x_i, x_l) and k is the cosine of two embeddings, shifted to [0, 1].

    As in the published code, the sum is averaged over all B^2 entries, and each sample is its own neighbor too. There
    are no parameters, and the models need not share their width.

    Source: Learning Deep Representations with Probabilistic Knowledge Transfer (Passalis & Tefas, 2018), section 3:
        the equations of the conditional probabilities with the cosine kernel, and of their Kullback-Leibler
        divergence; the weight 30000 is that of Tian et al., "Contrastive Representation Distillation", ICLR 2020.
    """

    default_weight = 30000.0
    default_used = (-1,)

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the mean over each sample's row of the B x B divergences (B)."""
        own, theirs = map(neighbor_probabilities, batch.embeddings())
        return (theirs * ((theirs + PROBABILITY_OFFSET).log() - (own + PROBABILITY_OFFSET).log())).mean(1)


def neighbor_probabilities(embeddings: Tensor) -> Tensor:
    """Return how probable each sample of (B, C) is as a neighbor of each other one, by shifted cosines.

    (B, B), at least in float32; rows sum to one.
    """
    affinities = (cosine_matrix(embeddings) + 1) / 2
    return affinities / affinities.sum(1, keepdim=True)


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
        (own, own_angles), (theirs, their_angles) = map(distances_and_angles, batch.embeddings())
        distances = F.smooth_l1_loss(own, theirs, reduction="none").mean(1)
        angles = F.smooth_l1_loss(own_angles, their_angles, reduction="none").mean((1, 2))
        return self.distance_weight * distances + self.angle_weight * angles


def distances_and_angles(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distances of every two samples of (B, C) and the cosines of the angles of every three.

    These are (B, B), over the mean of those that are not zero, and (B, B, B), whose first index is the vertex; both at
    least in float32. Identical samples have no direction: their cosines and their gradients are zero.
    """
    rows = at_least_float32(embeddings)
    differences = rows.unsqueeze(0) - rows.unsqueeze(1)
    squares = differences.square().sum(-1)
    apart = squares > IDENTICAL
    # The root has no gradient at zero: it is taken of ones there, and dropped.
    roots = torch.where(apart, squares, 1.0).sqrt()
    distances = torch.where(apart, roots, 0.0)
    mean = distances.sum() / apart.sum().clamp(min=1)
    directions = torch.where(apart.unsqueeze(-1), differences / roots.unsqueeze(-1), 0.0)
    with full_precision(directions):
        angles = directions @ directions.mT
    return distances / torch.where(mean > 0, mean, 1.0), angles


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
