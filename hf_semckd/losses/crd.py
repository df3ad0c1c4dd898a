"""Contrastive representation distillation (Tian et al., ICLR 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..features.precision import at_least_float32, full_precision
from .base import Shapes
from .baseline import BaselineBatch, BaselineLoss
from .positions import regress

TEMPERATURE = 0.07


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
        count = negative[0].sum()
        threshold = count.to(logits.dtype).log() + self._log_normalizer(logits, negative, direction)
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
