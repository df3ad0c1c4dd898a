"""Distillation from token ids drawn from the teacher's distribution, in place of its logits.

Anshumann et al., Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs (ACL 2025). In the divergence
`KL(p_t || p_s) = -H(p_t) - sum over v of p_t(v) log p_s(v)` the sum is an expectation over the teacher's tokens. The
mean over tokens drawn from p_t is unbiased, and so is its gradient; the entropy H has none and is kept as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..features.precision import at_least_float32

# Logits up to this number of elements are drawn from at once.
PIECE = 2**22


@dataclass(frozen=True, eq=False)
class SampledLogits:
    """What is known of a teacher's distributions at the positions (B, N) of a text.

    Attributes:
        ids: (B, N, K) token ids drawn from each, the same one as often as it was drawn.
        entropy: (B, N) that of each, in nats.
    """

    ids: Tensor
    entropy: Tensor

    def __getitem__(self, places: tuple[slice, slice]) -> SampledLogits:
        """Return those at some of the positions."""
        return SampledLogits(self.ids[places], self.entropy[places])

    def split(self, length: int, dim: int) -> list[SampledLogits]:
        """Return those of `length` positions each, as `Tensor.split`."""
        parts = zip(self.ids.split(length, dim), self.entropy.split(length, dim), strict=True)
        return [SampledLogits(*part) for part in parts]


def sampled_kd_loss(student_logits: Tensor, teacher: SampledLogits, temperature: float) -> Tensor:
    """Return an unbiased estimate (B, N) of `kd_loss`, for a sample drawn at the same temperature.

    The student's logits (B, N, V) are of the token ids that were drawn from. An estimate may be below 0.
    """
    student = at_least_float32(student_logits) / temperature
    drawn = student.gather(-1, teacher.ids).mean(-1)
    return (student.logsumexp(-1) - drawn - teacher.entropy) * temperature**2


@dataclass(frozen=True)
class TokenSampling:
    """Draws token ids from a teacher's distributions.

    The draws are stratified: one in each of K equal parts of the distribution's mass. Their mean is as unbiased as
    that of independent ones (the paper's), and never varies more.

    Attributes:
        draws: K > 0, at each position.
        vocabulary: Number of token ids that both models know; logits after them are left out.
        temperature: That of the distillation, > 0.
    """

    draws: int
    vocabulary: int
    temperature: float

    def __str__(self) -> str:
        """Say what decides which ids are drawn, but for the logits and the seed."""
        return f"{self.draws} stratified draws of {self.vocabulary} ids at {self.temperature!r}"

    @torch.no_grad()
    def __call__(self, logits: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return ids (N, K), in ascending order, and entropies (N) of logits (N, V); the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        points = torch.rand(len(logits), self.draws, generator=generator)
        points = ((points + torch.arange(self.draws)) / self.draws).to(logits.device)
        length = max(PIECE // self.vocabulary, 1)
        parts = [self._draw(*part) for part in zip(logits.split(length), points.split(length), strict=True)]
        ids, entropy = zip(*parts, strict=True)
        return torch.cat(ids), torch.cat(entropy)

    def _draw(self, logits: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Invert the distribution function at points (N, K) in [0, 1]."""
        logs = F.log_softmax(at_least_float32(logits[:, : self.vocabulary]) / self.temperature, dim=-1)
        probabilities = logs.exp()
        mass = probabilities.cumsum(-1)
        # Rounded, the mass does not end at 1 exactly.
        ids = torch.searchsorted(mass, points.to(mass) * mass[:, -1:], right=True)
        return ids.clamp_(max=self.vocabulary - 1), -(probabilities * logs).sum(-1)
