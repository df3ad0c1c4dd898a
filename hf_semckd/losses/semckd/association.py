"""Association weights between student and teacher layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import RaggedBatchError, message
from ...features.precision import at_least_float32, full_precision
from ..baseline import skip_map
from ..reduction import entropy
from ..similarity import by_shape, cosine_matrix, row_cosine

# Wide enough for every association that was measured, and small beside any student.
EMBEDDING_WIDTH = 32

# Logits of the learned association are cosines times a learned scale, held below this for stability.
MAXIMUM_SCALE = 100.0

# Cosines over 0.02 differ by up to 50: drawn together 64 times, they can be balanced at once.
SINKHORN_STAGES = 7

SINKHORN_ROUNDS = 5


class SimilarityEmbedding(nn.Sequential):
    """The published query or key network: Linear(B, 2d), ReLU, Linear(2d, d), then unit length; d = B / 4.

    Args:
        batch_size: B, the length of a similarity row; the network takes no other.
    """

    def __init__(self, batch_size: int):
        width = max(batch_size // 4, 1)
        super().__init__(nn.Linear(batch_size, 2 * width), nn.ReLU(inplace=True), nn.Linear(2 * width, width))
        self.batch_size = batch_size

    def forward(self, similarity: Tensor) -> Tensor:
        """Embed each row of a (B, B) similarity matrix into (B, d).

        Raises:
            RaggedBatchError: When the batch has another size than B.
        """
        if len(similarity) != self.batch_size:
            raise RaggedBatchError(ragged_batch_message(len(similarity), self.batch_size))
        # Raw similarities are beyond float16, to which autocast would lower them.
        with full_precision(similarity):
            return F.normalize(super().forward(similarity.to(next(self.parameters()).dtype)), dim=1)


class FeatureEmbedding(nn.Sequential):
    """The calibrated query or key network: on a sample's own mean feature, so any batch size and order will do.

    Args:
        channels: C of the layer.
    """

    def __init__(self, channels: int):
        width = EMBEDDING_WIDTH
        super().__init__(
            nn.LayerNorm(channels, elementwise_affine=False),
            nn.Linear(channels, 2 * width),
            nn.ReLU(inplace=True),
            nn.Linear(2 * width, width),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Embed (B, C) into (B, d) of unit length."""
        dtype = next(self.parameters()).dtype
        return F.normalize(super().forward(features.to(dtype)), dim=1)


def ragged_batch_message(received: int, expected: int) -> str:
    """Say why the published form refuses a batch and what to do about it."""
    return message(
        "The published association takes similarity rows, whose length is the batch size, and met another one",
        received=f"a batch of {received}",
        expected=f"{expected} samples in every batch",
        todo="set dataloader_drop_last=True, pad the dataset to a multiple of the batch size, or use the default "
        "(calibrated) form, which takes any batch size",
    )


def attention_weights(query: Sequence[Tensor], key: Sequence[Tensor], scale: Tensor | float) -> Tensor:
    """Return softmax over t of scale * <Q_s, K_t> (SemCKD, equation 6, with scale = 1 / temperature).

    Args:
        query: S tensors (B, d).
        key: T tensors (B, d).
        scale: Factor of the logits.

    Returns:
        (B, S, T); sums to one over the last dimension.
    """
    queries, keys = at_least_float32(torch.stack(list(query), 1)), at_least_float32(torch.stack(list(key), 1))
    with full_precision(queries):
        return torch.softmax(torch.einsum("bsd,btd->bst", queries, keys) * scale, dim=-1)


@torch.no_grad()
def similarity_weights(
    student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float, matched: bool = False
) -> Tensor:
    """Return softmax over t of `row_cosine` / temperature, without gradient: how alike both layers see the sample.

    Weights that are not trained cannot drift to the teacher layer that is easiest to imitate.

    Args:
        student: S tensors (B, D_s), see `summary`.
        teacher: T tensors (B, D_t).
        temperature: > 0; smaller is sharper.
        matched: Whether a teacher layer is shared out, see `sinkhorn_weights`.

    Returns:
        (B, S, T). Uniform for a batch of one, which has nothing to compare.
    """
    left, right = (torch.stack(by_shape(cosine_matrix, rows)) for rows in (student, teacher))
    scores = row_cosine(left, right) / temperature
    return sinkhorn_weights(scores) if matched else torch.softmax(scores, dim=-1)


def sinkhorn_weights(scores: Tensor, rounds: int = SINKHORN_ROUNDS) -> Tensor:
    """Return softmax over t of scores, held back where all student layers want the same teacher layer.

    Layers that are like all others (the first of a CNN, say) would else be everybody's teacher. Here a teacher layer
    weighs at most max(1, S / T) in all, summed over student layers; a layer that nobody resembles still gets nothing.
    These are the weights of the largest sum_st w_st * scores_st plus their entropy under that bound, found by scaling
    rows and columns in turn, first for scores drawn together, which takes few rounds, and then less and less so. Rows
    add up to 1, columns keep the bound as closely as the rounds have come.

    Args:
        scores: (B, S, T).
        rounds: How often rows and columns are scaled at every stage; twice as often at the last.

    Returns:
        (B, S, T).

    Source: Chizat et al., "Scaling algorithms for unbalanced optimal transport problems", 2018.
    """
    bound = max(1.0, scores.shape[1] / scores.shape[2])
    held = torch.zeros_like(scores[:, :1])
    for halvings in reversed(range(SINKHORN_STAGES)):
        drawn = scores / 2**halvings
        for _ in range(rounds if halvings else 2 * rounds):
            taken = torch.softmax(drawn + held, dim=-1).sum(1, keepdim=True)
            # A layer that nobody takes is not held back: minus the logarithm of 0 is cut off at 0.
            held = torch.sub(held, taken.div_(bound).log_()).clamp_(max=0.0)
        if halvings:
            held = 2 * held
    return torch.softmax(scores + held, dim=-1)


def fixed_weights(
    kind: Literal["uniform", "last", "one_to_one"], students: int, teachers: int, like: Tensor
) -> Tensor:
    """Return the weights (B, S, T) of a control: equal; last layer to last layer only; or a uniform skip map.

    Args:
        kind: Which one.
        students: S.
        teachers: T.
        like: A tensor of the batch, for size, type and device.
    """
    shape = (len(like), students, teachers)
    if kind == "uniform":
        return like.new_full(shape, 1.0 / teachers)
    weights = like.new_zeros(shape)
    if kind == "last":
        weights[:, -1, -1] = 1.0
        return weights
    for student, teacher in enumerate(skip_map(students, teachers)):
        weights[:, student, teacher] = 1.0
    return weights


def kl_to_uniform(weights: Tensor, temperature: float) -> Tensor:
    """Return temperature * KL(weights || uniform) for every sample and student layer, the learned form's restraint.

    For errors e, sum_t w_t e_t + temperature * KL(w || uniform) is strictly convex in w, and its only minimum over
    the simplex is the Gibbs distribution w_t ~ exp(-e_t / temperature). Every weight there is at least
    exp(-(max e - min e) / temperature) / T: the minimum is never on the border, so training cannot collapse onto
    one layer, as it does without this term.

    Args:
        weights: (B, S, T).
        temperature: > 0, in units of the (standardized) error.

    Returns:
        (B, S), zero for uniform weights.
    """
    return temperature * (math.log(weights.shape[-1]) - entropy(weights))


def bound_of_cosine_weights(temperature: float, teachers: int) -> float:
    """Return the largest weight that a softmax over cosines / temperature can give one of T layers."""
    return 1.0 / (1.0 + (teachers - 1) * math.exp(-2.0 / temperature))
