"""Relations between samples in the last layers: SP, PKT, RKD, CC and CRD teach the student those of the teacher."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..features.geometry import fitting_mask
from ..features.precision import at_least_float32, full_precision, smallest_length, unit_vectors
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
# The temperature of CRD's critic.
TEMPERATURE = 0.07


class SPLoss(BaselineLoss):
    """The squared difference of the last layers' similarity matrices.

    total = |G_t - G_s|^2 / B^2 with G the matrix of inner products of the flattened features, each row scaled to unit
    length. per_sample[i] is the share of row i, times B, so that the mean is the total: it depends on the rest of the
    batch, and micro-batches give other values than the batch they make up. For a batch of one it is zero. There are no
    parameters; the models need share neither width nor positions.

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, section 3, for one pair of
        layers. Weight: Tian et al. (ICLR 2020).
    """

    default_weight = 3000.0
    default_used = (-1,)

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the squared distance of each row (B) over the batch size."""
        layers = (batch.features[-1], batch.student_mask(-1)), (batch.targets.whole(-1), batch.teacher_mask(-1))
        own, theirs = (_similarity_rows(rows, fitting_mask(mask, rows)) for rows, mask in layers)
        return (theirs - own).square().mean(1)


def _similarity_rows(features: Tensor, mask: Tensor | None) -> Tensor:
    return unit_vectors(similarity_matrix(features, mask), smallest_length(features.dtype) ** 2)


class PKTLoss(BaselineLoss):
    """The divergence of the probabilities with which samples are one another's neighbors.

    total = 1 / B^2 * sum over i, j of p_t[i, j] * log(p_t[i, j] / p_s[i, j]), where p[i, j] = k(x_i, x_j) / sum over l
    of k(x_i, x_l) and k is the cosine of two embeddings, shifted to [0, 1]. As in the published code, the sum is
    averaged over all B^2 entries, and each sample is its own neighbor too. There are no parameters.

    Source: Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018,
        section 3, with the cosine kernel and the Kullback-Leibler divergence. Weight: Tian et al. (ICLR 2020).
    """

    default_weight = 30000.0
    default_used = (-1,)

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the mean over each sample's row of the B x B divergences (B)."""
        smallest = smallest_length(batch.features[-1].dtype)
        kernels = [(cosine_matrix(embeddings, smallest) + 1) / 2 for embeddings in batch.embeddings()]
        own, theirs = (kernel / kernel.sum(1, keepdim=True) for kernel in kernels)
        return (theirs * ((theirs + PROBABILITY_OFFSET).log() - (own + PROBABILITY_OFFSET).log())).mean(1)


class RKDLoss(BaselineLoss):
    """The student's embeddings have the distances and angles of the teacher's.

    total = distance_weight * mean over i, j of l(d_s[i, j] - d_t[i, j])
    + angle_weight * mean over i, j, k of l(a_s[i, j, k] - a_t[i, j, k]), where d are Euclidean distances of
    embeddings, divided by the mean of those that are not zero, a is the cosine of the angle at i between j and k, and
    l the Huber loss. As in the published code, means are taken over all B^2 and B^3 entries. The angles need B^2 * C
    and B^3 numbers. There are no parameters.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019, section 3.2: the distance-wise loss (RKD-D)
        and the angle-wise loss (RKD-A); the weights 25 and 50 are those for classification.
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
        smallest = smallest_length(batch.features[-1].dtype)
        pairs = (distances_and_angles(rows, smallest) for rows in batch.embeddings())
        (own, own_angles), (theirs, their_angles) = pairs
        distances = F.smooth_l1_loss(own, theirs, reduction="none").mean(1)
        angles = F.smooth_l1_loss(own_angles, their_angles, reduction="none").mean((1, 2))
        return self.distance_weight * distances + self.angle_weight * angles


def distances_and_angles(embeddings: Tensor, smallest: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the distances of every two samples of (B, C) and the cosines of the angles of every three.

    These are (B, B), over the mean of those that are not zero, and (B, B, B), whose first index is the vertex; both at
    least in float32. Samples that are identical, or not farther apart than `smallest`, have no direction: their
    cosines and their gradients are zero.
    """
    rows = at_least_float32(embeddings)
    differences = rows.unsqueeze(0) - rows.unsqueeze(1)
    squares = differences.square().sum(-1)
    apart = squares > max(IDENTICAL, smallest**2)
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
    its Taylor series in <x, y> up to the second power. Both linear layers are trained, as in the code of Tian et al.,
    which multiplies the absolute errors of neighbors in the batch instead: that depends on its order.

    Source: Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, section 3: the loss L_CC, with
        the Taylor series of the Gaussian RBF; gamma 0.4 and order 2 are the paper's, the width and the weight those of
        Tian et al. (ICLR 2020).
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


class CRDLoss(BaselineLoss):
    """Contrastive loss: an embedding of one model tells the other model's of the same sample from those of others.

    per_sample = -log h(own pair) - sum over N negatives of log(1 - h), once with the student's embedding as the anchor
    among the teacher's and once the other way round, where h = exp(g) / (exp(g) + N * c), g = <anchor, other> / 0.07,
    and both embeddings are projected linearly to 128 channels and to unit length. c is the mean of exp(g) over the
    negatives of the first training batch with any, as in the published code (where it is called Z, and the size of the
    data set cancels).

    Negatives are the other samples of the batch and the latest embeddings of earlier training batches, in a ring
    buffer that is part of the module's state, so that a resumed run goes on with it. Features come without sample
    indices and labels, hence these departures from the paper:

    - the published memory has an entry per sample, updated with a momentum of 0.5; the ring has none to update;
    - a sample's own older embedding may be among its negatives, and so are samples of its class;
    - the positive is the current embedding, not the memory's; it and the other samples of the batch pass gradients to
      both linear layers;
    - N grows from B - 1 to `negatives` + B - 1, where the published one is 16384 random entries from the start.

    Attributes:
        student_ring, teacher_ring: (negatives, embedding_size) stored embeddings; zeros where there is none yet.
        seen: Number of embeddings that have been stored so far; the next goes to this position in the ring.
        log_normalizer: (2) log c for either anchor, infinite before it is known.

    Source: Contrastive Representation Distillation (Tian et al., 2020), sections 3.1 and 3.2: the objective of the
        critic, h(T, S) = exp(g / t) / (exp(g / t) + N / M), and the implementation with a memory of negatives.
    """

    default_weight = 0.8
    default_used = (-1,)
    student_ring: Tensor
    teacher_ring: Tensor
    seen: Tensor
    log_normalizer: Tensor

    def __init__(
        self,
        student_shapes: Shapes,
        teacher_shapes: Shapes,
        *,
        tokens_aligned: bool = True,
        negatives: int = 16384,
        embedding_size: int = 128,
    ):
        super().__init__(student_shapes, teacher_shapes, tokens_aligned=tokens_aligned)
        if negatives < 1:
            raise ConfigurationError(
                "The ring of negatives has no room",
                received=f"negatives={negatives}",
                expected="at least 1",
                todo="leave negatives out for the published 16384, or choose fewer to save memory",
            )
        self.student_head = nn.Linear(self.student_specs[-1].channels, embedding_size)
        self.teacher_head = nn.Linear(self.teacher_specs[-1].channels, embedding_size)
        self.register_buffer("student_ring", torch.zeros(negatives, embedding_size))
        self.register_buffer("teacher_ring", torch.zeros(negatives, embedding_size))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("log_normalizer", torch.full((2,), torch.inf))

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the loss of each sample as an anchor of either model (B), and store the batch while training."""
        student, teacher = batch.embeddings()
        own = F.normalize(at_least_float32(regress(self.student_head, student)), dim=1)
        theirs = F.normalize(at_least_float32(regress(self.teacher_head, teacher)), dim=1)
        # Both directions before anything is stored.
        by_student = self._direction(own, theirs, self.teacher_ring, 0)
        by_teacher = self._direction(theirs, own, self.student_ring, 1)
        if self.training:
            self._store(own.detach(), theirs.detach())
        return by_student + by_teacher

    def _direction(self, anchors: Tensor, others: Tensor, ring: Tensor, direction: int) -> Tensor:
        """Return the loss (B) of anchors among the other model's embeddings of the batch and in the ring."""
        size = len(anchors)
        with full_precision(anchors):
            # A copy: the ring is written to before the backward pass.
            logits = anchors @ torch.cat([others, ring.to(others.dtype)]).T / TEMPERATURE
        own = torch.eye(size, dtype=torch.bool, device=logits.device)
        stored = torch.arange(len(ring), device=logits.device) < self.seen
        negative = torch.cat([~own, stored.expand(size, -1)], 1)
        threshold = negative[0].sum().to(logits.dtype).log() + self._log_normalizer(logits, negative, direction)
        # log h = -softplus(log(N c) - g) and log(1 - h) = -softplus(g - log(N c)).
        positive = F.softplus(threshold - logits.diagonal())
        return positive + torch.where(negative, F.softplus(logits - threshold), 0.0).sum(1)

    @torch.no_grad()
    def _log_normalizer(self, logits: Tensor, negative: Tensor, direction: int) -> Tensor:
        """Return log c, from the batch while it is not known; -inf where there is no negative to tell it."""
        known = self.log_normalizer[direction]
        mean = logits.masked_fill(~negative, -torch.inf).flatten().logsumexp(0)
        mean = mean - negative.sum().clamp(min=1).to(mean.dtype).log()
        normalizer = torch.where(known.isfinite(), known.to(mean.dtype), mean)
        if self.training:
            self.log_normalizer[direction] = normalizer
        return normalizer

    @torch.no_grad()
    def _store(self, student: Tensor, teacher: Tensor) -> None:
        """Write a batch over the oldest entries."""
        size, room = len(student), len(self.student_ring)
        kept = min(size, room)
        places = (self.seen + torch.arange(size - kept, size, device=self.seen.device)) % room
        self.student_ring[places] = student[size - kept :].to(self.student_ring.dtype)
        self.teacher_ring[places] = teacher[size - kept :].to(self.teacher_ring.dtype)
        self.seen += size
