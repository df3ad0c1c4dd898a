"""Pure functions on tensors: what SemCKD computes, without modules, state or configuration.

Symbols: B samples, S student layers, T teacher layers, N positions (tokens, or the cells of a map), C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError, message

# A row whose spread is below this share of its size is constant: what is left is the rounding of float32.
ROUNDING = 1e-6


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the distillation loss of Hinton et al. (2015) for every item: T^2 * KL(teacher/T || student/T).

    Args:
        student_logits: (..., classes).
        teacher_logits: Same shape; no gradient flows into it.
        temperature: T > 0; both distributions are softened by it, and the factor T^2 keeps the size of the
            gradient independent of it.

    Returns:
        (...) divergences in nats times T^2, at least in float32 precision.
    """
    log_student = F.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    log_teacher = F.log_softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1) * temperature**2


def binary_kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the distillation loss of independent labels: the mean over labels of T^2 * KL of two Bernoullis.

    Args:
        student_logits: (..., labels), one logit a label.
        teacher_logits: Same shape; no gradient flows into it.
        temperature: T > 0.

    Returns:
        (...) mean over the labels, at least in float32 precision.
    """
    student = at_least_float32(student_logits) / temperature
    teacher = at_least_float32(teacher_logits.detach()) / temperature
    positive = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    negative = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return (positive + negative).mean(-1) * temperature**2


def similarity_matrix(features: Tensor, mask: Tensor | None = None, *, normalize: bool = False) -> Tensor:
    """Return the similarity of every two samples of a batch: A = R R^T, R a sample flattened to one row.

    Args:
        features: (B, ...).
        mask: (B, N) of ones and zeros for (B, N, C) features; positions with 0 do not take part.
        normalize: Use cosines (rows of unit length), which neither overflow nor depend on the layer's scale.
            The published form (SemCKD, equation 4) does not.

    Returns:
        (B, B), at least in float32: the raw form overflows half precision on ordinary maps.
    """
    features = at_least_float32(features)
    if mask is not None:
        features = features.masked_fill(mask.unsqueeze(-1) == 0, 0.0)
    rows = features.flatten(1)
    if normalize:
        return cosine_matrix(rows)
    with full_precision(rows):
        return rows @ rows.T


def cosine_matrix(rows: Tensor) -> Tensor:
    """Return the cosines (..., B, B) of the rows of (..., B, C), at least in float32; 0 for a row of zeros."""
    rows = F.normalize(at_least_float32(rows), dim=-1)
    with full_precision(rows):
        return rows @ rows.mT


def row_cosine(student_similarity: Tensor, teacher_similarity: Tensor) -> Tensor:
    """Return how alike two layers see each sample: the cosine of its centred rows of two similarity matrices.

    The cosine of two rows does not change when the batch is reordered, and centring removes what all samples of
    a layer share. It is the per-sample form of centred kernel alignment.

    Args:
        student_similarity: (S, B, B) similarity matrices of the student layers.
        teacher_similarity: (T, B, B) similarity matrices of the teacher layers.

    Returns:
        (B, S, T) in [-1, 1]; zeros where a row is constant (always for B = 1), hence uniform weights.
    """
    dtype = torch.promote_types(student_similarity.dtype, teacher_similarity.dtype)
    student_similarity, teacher_similarity = student_similarity.to(dtype), teacher_similarity.to(dtype)
    student = student_similarity - student_similarity.mean(-1, keepdim=True)
    teacher = teacher_similarity - teacher_similarity.mean(-1, keepdim=True)
    with full_precision(student):
        return torch.einsum("sbk,tbk->bst", _unit(student, student_similarity), _unit(teacher, teacher_similarity))


def relative_distances(embeddings: Tensor) -> Tensor:
    """Return the distance of every two samples, in units of the batch's mean distance between different samples.

    Args:
        embeddings: (..., B, C), a batch for each of the first dimensions.

    Returns:
        (..., B, B), at least in float32, zero on the diagonal; the gradient is zero, up to rounding, where
        two samples coincide.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019, distance-wise potential.
    """
    rows = at_least_float32(embeddings)
    samples, limits = rows.shape[-2], torch.finfo(rows.dtype)
    with full_precision(rows):
        # Distances do not change when the mean is taken off, and the squares of large offsets would cancel.
        rows = rows - rows.mean(-2, keepdim=True)
        norms = rows.square().sum(-1)
        squares = norms.unsqueeze(-1) + norms.unsqueeze(-2) - 2.0 * rows @ rows.mT
        floor = (limits.eps * norms.detach().amax(-1) + limits.tiny)[..., None, None]
        different = ~torch.eye(samples, dtype=torch.bool, device=rows.device)
        distances = squares.clamp(min=floor).sqrt() * ((squares > floor) & different)
        mean = distances.sum((-2, -1), keepdim=True) / max(samples * (samples - 1), 1)
        return distances / mean.clamp(min=limits.tiny**0.5)


def by_shape(function: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Apply a function to tensors that are stacked where they look alike: a GPU is as fast with many as with one.

    Args:
        function: Takes (L, ...) and returns a result for each of the L.
        tensors: Of any shapes and precisions.

    Returns:
        Their results, in their order.
    """
    groups: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.shape, tensor.dtype), []).append(index)
    results: dict[int, Tensor] = {}
    for members in groups.values():
        stacked = torch.stack([tensors[index] for index in members])
        results |= dict(zip(members, function(stacked).unbind(), strict=True))
    return [results[index] for index in range(len(tensors))]


def pool_map(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool maps (B, C, H, W) to a (height, width) that is not larger; the same tensor when it is equal."""
    if tuple(features.shape[-2:]) == tuple(size):
        return features
    return F.adaptive_avg_pool2d(features, size)


def map_to_tokens(features: Tensor) -> Tensor:
    """Turn a map (B, C, H, W) into tokens (B, H * W, C), row by row."""
    return features.flatten(2).transpose(1, 2)


def tokens_to_map(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Turn tokens (B, prefix + H * W, C) into a map (B, C, H, W); CLS and register tokens in front are dropped.

    Raises:
        InputError: When there are fewer tokens than cells in the grid.
    """
    height, width = grid
    if features.shape[1] < height * width:
        raise InputError(
            message(
                "The tokens do not fill the grid",
                received=f"{features.shape[1]} tokens for a grid of {height} x {width}",
                expected=f"at least {height * width} tokens",
                todo="use one image size for all batches, or name the layers to use with student_layers / "
                "teacher_layers",
            )
        )
    patches = features[:, features.shape[1] - height * width :]
    return patches.transpose(1, 2).unflatten(2, grid)


def pool_tokens(features: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Average-pool tokens (B, H * W, C) that lie on a grid (H, W) to a map (B, C, height, width) that is not larger.

    One product with a matrix: moving the channels in front of the positions first would cost far more.
    """
    if tuple(grid) == tuple(size):
        return tokens_to_map(features, grid)
    cells = torch.eye(grid[0] * grid[1], dtype=at_least_float32(features[:0]).dtype, device=features.device)
    shares = F.adaptive_avg_pool2d(cells.unflatten(1, grid).unsqueeze(1), size).flatten(1).T
    with full_precision(features):
        return (shares.to(features.dtype) @ features).transpose(1, 2).unflatten(2, size)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Average (B, N) values over the positions of each sample whose mask is 1; zero where there is none."""
    if mask is None:
        return values.mean(1)
    mask = mask.to(values.dtype)
    # A masked position may hold anything, NaN included (attention over nothing): select, do not multiply.
    kept = torch.where(mask > 0, values, torch.zeros_like(values))
    return kept.sum(1) / mask.sum(1).clamp(min=1)


def squared_error(projected: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared error of each sample (B), at least in float32: squares overflow half precision.

    Args:
        projected: (B, N, C).
        target: (B, N, C).
        mask: (B, N); positions with 0 do not count and get no gradient, whatever they hold.
    """
    difference = at_least_float32(projected) - target
    if mask is not None:
        difference.masked_fill_(mask.unsqueeze(-1) == 0, 0.0)
    return masked_mean(difference.square().mean(-1), mask)


def entropy(weights: Tensor) -> Tensor:
    """Return the entropy in nats of weights (..., T): log T when uniform, 0 when all lies on one layer."""
    return torch.special.entr(weights).sum(-1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen half-precision tensors to float32 and leave wider ones (float64 included) as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _unit(centred: Tensor, rows: Tensor) -> Tensor:
    """Return centred rows with unit length; rows that are constant up to rounding come out as (nearly) zero."""
    floor = (ROUNDING * rows.norm(dim=-1, keepdim=True)).clamp(min=1e-12)
    return centred / torch.maximum(centred.norm(dim=-1, keepdim=True), floor)


def full_precision(tensor: Tensor) -> torch.autocast:
    """Return a context without autocast: similarities are ill-conditioned, half precision would lose them."""
    return torch.autocast(tensor.device.type, enabled=False)
