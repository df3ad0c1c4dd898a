"""Association weights between student and teacher layers, and the projections that make two layers comparable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError, RaggedBatchError, message
from .features import FeatureSpec
from .functional import (
    at_least_float32,
    by_shape,
    cosine_matrix,
    entropy,
    full_precision,
    map_to_tokens,
    pool_map,
    pool_tokens,
    row_cosine,
)

# Wide enough for every association that was measured, and small beside any student.
EMBEDDING_WIDTH = 32
# Logits of the learned association are cosines times a learned scale, held below this for stability.
MAXIMUM_SCALE = 100.0
# Larger maps are pooled to this before similarities are taken: what is where matters, single pixels do not.
SUMMARY_GRID = 4
# Cosines over 0.02 differ by up to 50: drawn together 64 times, they can be balanced at once.
MATCHING_STAGES = 7
MATCHING_ROUNDS = 5


@dataclass(frozen=True)
class Alignment:
    """How a student layer and a teacher layer are brought to the same positions.

    Attributes:
        kind: `tokens`: position by position; `grid`: both become maps, the larger pooled to the smaller one's grid;
            `mean`: both are averaged over their positions (different tokenisations, or a vector).
    """

    kind: Literal["tokens", "grid", "mean"]

    @classmethod
    def of(cls, student: FeatureSpec, teacher: FeatureSpec, tokens_aligned: bool) -> Alignment:
        """Choose the alignment of a pair.

        Args:
            student: The student layer.
            teacher: The teacher layer.
            tokens_aligned: Whether equal positions of both models mean the same input (one tokenisation, or images).
        """
        both_tokens = student.kind == teacher.kind == "tokens"
        same_layout = (student.length, student.prefix, student.grid) == (teacher.length, teacher.prefix, teacher.grid)
        if both_tokens and same_layout and tokens_aligned:
            return cls("tokens")
        if student.grid is not None and teacher.grid is not None:
            return cls("grid")
        return cls("mean")


def common_grid(
    student: Tensor, student_spec: FeatureSpec, teacher: Tensor, teacher_spec: FeatureSpec
) -> tuple[int, int]:
    """Return the smaller height and the smaller width of two layers that are maps or have a grid."""
    first, second = grid_of(student, student_spec), grid_of(teacher, teacher_spec)
    return min(first[0], second[0]), min(first[1], second[1])


def grid_of(feature: Tensor, spec: FeatureSpec) -> tuple[int, int]:
    """Return the (height, width) of a map, or of the patches among image tokens."""
    if feature.dim() == 4:
        return int(feature.shape[2]), int(feature.shape[3])
    assert spec.grid is not None
    return spec.grid


def limited_grid(feature: Tensor, spec: FeatureSpec, limit: int | None) -> tuple[int, int]:
    """Return `grid_of` a layer, but at most `limit` rows and columns; None for no limit."""
    height, width = grid_of(feature, spec)
    return (height, width) if limit is None else (min(height, limit), min(width, limit))


def as_map(feature: Tensor, spec: FeatureSpec, size: tuple[int, int]) -> Tensor:
    """Return a layer's output as a map (B, C, *size).

    Raises:
        InputError: When there are more or fewer tokens than the layer was described with.
    """
    if feature.dim() == 4:
        return pool_map(feature, size)
    if feature.shape[1] != spec.length:
        raise InputError(
            message(
                f"Layer `{spec.name}` has another number of image tokens than at the start",
                received=f"{feature.shape[1]} tokens",
                expected=f"{spec.length}: {spec.prefix} in front of a grid of {grid_of(feature, spec)}",
                todo="use one image size for all batches",
            )
        )
    return pool_tokens(feature[:, spec.prefix :], grid_of(feature, spec), size)


def as_tokens(feature: Tensor) -> Tensor:
    """Return a layer's output as (B, N, C)."""
    if feature.dim() == 4:
        return map_to_tokens(feature)
    return feature.unsqueeze(1) if feature.dim() == 2 else feature


class Average:
    """Averages layers' outputs over their positions; what depends on the mask alone is computed once.

    Args:
        mask: (B, N); positions with 0 do not count in features of N positions, whatever they hold. None: all count.
    """

    def __init__(self, mask: Tensor | None = None):
        self.mask = mask
        self._parts: tuple[Tensor, Tensor] | None = None

    def __call__(self, feature: Tensor) -> Tensor:
        """Return the average (B, C) of (B, C, H, W), (B, N, C) or (B, C); under the mask at least in float32."""
        if feature.dim() == 4:
            return feature.mean((2, 3))
        if feature.dim() == 2:
            return feature
        if self.mask is None or self.mask.shape[1] != feature.shape[1]:
            return feature.mean(1)
        dtype = at_least_float32(feature[:0]).dtype
        if self._parts is None or self._parts[1].dtype != dtype:
            counted = self.mask != 0
            self._parts = ~counted.unsqueeze(-1), counted.sum(1, keepdim=True).clamp(min=1).to(dtype)
        left_out, count = self._parts
        # In half precision the sum of a long sequence overflows, though its mean would not.
        return feature.masked_fill(left_out, 0.0).sum(1, dtype=dtype) / count


def embedding(feature: Tensor, spec: FeatureSpec, average: Average) -> Tensor:
    """Return the vector (B, C) that stands for a sample: what a classifier would read of its last layer.

    The average of a map (global average pooling), the first token (CLS) in front of image patches, and the average of
    the tokens that count everywhere else.

    Args:
        feature: (B, C, H, W) or (B, N, C).
        spec: What the layer looks like.
        average: Knows the tokens that count.
    """
    if feature.dim() == 3 and spec.prefix > 0:
        return feature[:, 0]
    return average(feature)


def summary(feature: Tensor, spec: FeatureSpec, average: Average) -> Tensor:
    """Return what similarities between samples are taken on: a small map for images, the mean token for text.

    Returns:
        (B, C * cells), at least in float32.
    """
    if spec.grid is None:
        return at_least_float32(average(feature))
    return at_least_float32(as_map(feature, spec, summary_size(feature, spec)).flatten(1))


def summary_size(feature: Tensor, spec: FeatureSpec) -> tuple[int, int]:
    """Return the height and width of the small map that a summary is."""
    return limited_grid(feature, spec, SUMMARY_GRID)


class FeatureDecoder(nn.Sequential):
    """Two convolutions that read a student's map before it is projected: 1x1 conv, BN, ReLU, 3x3 conv, BN, ReLU.

    A linear projection asks the student to hold what the teacher holds; a decoder, that it can be found in it.

    Args:
        channels: C of the student's layer.
        width: Channels of what comes out.
        kernel: Size of the second convolution, odd.

    Source: the projections of SemCKD (Chen et al., 2021), without their last convolution; no bias.
    """

    def __init__(self, channels: int, width: int, kernel: int = 3):
        super().__init__(
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Take (B, C, H, W) to (B, C', H, W).

        A single position has no variance over the batch: it is normalised by the running statistics instead.
        """
        if not self.training or len(maps) * maps.shape[2] * maps.shape[3] != 1:
            return super().forward(maps)
        for layer in self:
            maps = _by_running_statistics(layer, maps) if isinstance(layer, nn.BatchNorm2d) else layer(maps)
        return maps


class ConvolutionalProjection(FeatureDecoder):
    """The published projection of one pair: 1x1 conv to 2 * C_t, BN, ReLU, 3x3 conv, BN, ReLU, 1x1 conv to C_t.

    Args:
        student_channels: C_s.
        teacher_channels: C_t.
        kernel: Size of the middle convolution: 3 on maps, 1 on tokens, which have no neighbours in two dimensions.

    Source: SemCKD (Chen et al., 2021), section 3.3; no bias in the convolutions.
    """

    def __init__(self, student_channels: int, teacher_channels: int, kernel: int = 3):
        super().__init__(student_channels, 2 * teacher_channels, kernel)
        self.append(nn.Conv2d(2 * teacher_channels, teacher_channels, 1, bias=False))

    def project_tokens(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Project (B, N, C_s) token by token; masked tokens do not reach the batch statistics and come out as zero."""
        rows = tokens.flatten(0, 1) if mask is None else tokens[mask.bool()]
        projected = self(rows[:, :, None, None])[:, :, 0, 0]
        if mask is None:
            return projected.view(*tokens.shape[:2], -1)
        out = projected.new_zeros(*tokens.shape[:2], projected.shape[1])
        out[mask.bool()] = projected
        return out


def _by_running_statistics(norm: nn.BatchNorm2d, maps: Tensor) -> Tensor:
    return F.batch_norm(
        maps, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
    )


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
        matched: Whether a teacher layer is shared out, see `matched_weights`.

    Returns:
        (B, S, T). Uniform for a batch of one, which has nothing to compare.
    """
    left, right = (torch.stack(by_shape(cosine_matrix, rows)) for rows in (student, teacher))
    scores = row_cosine(left, right) / temperature
    return matched_weights(scores) if matched else torch.softmax(scores, dim=-1)


def matched_weights(scores: Tensor, rounds: int = MATCHING_ROUNDS) -> Tensor:
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
    for halvings in reversed(range(MATCHING_STAGES)):
        drawn = scores / 2**halvings
        for _ in range(rounds if halvings else 2 * rounds):
            taken = torch.softmax(drawn + held, dim=-1).sum(1, keepdim=True)
            # A layer that nobody takes is not held back: minus the logarithm of 0 is cut off at 0.
            held = torch.sub(held, taken.div_(bound).log_()).clamp_(max=0.0)
        if halvings:
            held = 2 * held
    return torch.softmax(scores + held, dim=-1)


def skip_map(students: int, teachers: int) -> list[int]:
    """Return which teacher layer each student layer is paired with by hand: the last with the last, evenly below.

    Args:
        students: S >= 1.
        teachers: T >= 1.
    """
    # ceil((s + 1) * T / S) - 1 in whole numbers.
    return [max(-(-(s + 1) * teachers // students) - 1, 0) for s in range(students)]


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


def free_energy(weights: Tensor, temperature: float) -> Tensor:
    """Return temperature * KL(weights || uniform) for every sample and student layer, the learned form's restraint.

    For errors e, sum_t w_t e_t + temperature * KL(w || uniform) is strictly convex in w, and its only minimum over
    the simplex is the Gibbs distribution w_t ~ exp(-e_t / temperature). Every weight there is at least
    exp(-(max e - min e) / temperature) / T: the minimum is never on the border, so training cannot collapse onto
    one layer, as it does without this term.

    Args:
        weights: (B, S, T).
        temperature: > 0, in units of the (standardised) error.

    Returns:
        (B, S), zero for uniform weights.
    """
    return temperature * (math.log(weights.shape[-1]) - entropy(weights))


def bound_of_cosine_weights(temperature: float, teachers: int) -> float:
    """Return the largest weight that a softmax over cosines / temperature can give one of T layers."""
    return 1.0 / (1.0 + (teachers - 1) * math.exp(-2.0 / temperature))
