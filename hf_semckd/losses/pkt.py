"""Probabilistic knowledge transfer (Passalis & Tefas, ECCV 2018)."""

from torch import Tensor

from .baseline import BaselineBatch, BaselineLoss
from .similarity import cosine_matrix

# The published code adds it to both probabilities.
EPSILON = 1e-7


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
        return (theirs * ((theirs + EPSILON).log() - (own + EPSILON).log())).mean(1)


def neighbor_probabilities(embeddings: Tensor) -> Tensor:
    """Return how probable each sample of (B, C) is as a neighbor of each other one, by shifted cosines.

    (B, B), at least in float32; rows sum to one.
    """
    affinities = (cosine_matrix(embeddings) + 1) / 2
    return affinities / affinities.sum(1, keepdim=True)
