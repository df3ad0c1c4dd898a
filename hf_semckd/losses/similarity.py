"""Similarities of samples, and how alike they are in two layers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..features.precision import at_least_float32, full_precision, unit_vectors
from .positions import zero_masked

# A row whose spread is below this share of its size is constant: what is left is the rounding of float32.
ROUNDING = 1e-6


def similarity_matrix(features: Tensor, mask: Tensor | None = None, *, normalize: bool = False) -> Tensor:
    """Return the similarity (B, B) of every two samples of (B, ...): A = R R^T, R a sample flattened to one row.

    At least in float32: the raw form overflows half precision. Positions of (B, N, C) whose mask (B, N) is 0 do not
    take part. `normalize` gives cosines, unlike the published form (SemCKD, equation 4), which depends on the scale.
    """
    rows = zero_masked(at_least_float32(features), mask).flatten(1)
    if normalize:
        return cosine_matrix(rows)
    with full_precision(rows):
        return rows @ rows.T


def cosine_matrix(rows: Tensor, smallest: float = 1e-12) -> Tensor:
    """Return the cosines (..., B, B) of the rows of (..., B, C), at least in float32; 0 for a row without direction.

    `smallest` is that of `unit_vectors`.
    """
    rows = unit_vectors(at_least_float32(rows), smallest)
    with full_precision(rows):
        return rows @ rows.mT


def row_cosine(student_similarity: Tensor, teacher_similarity: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return the cosine of each sample's centered rows of two similarity matrices, per pair of layers.

    It does not depend on the order of the samples in a row, and centering removes what all samples of a layer share:
    the per-sample form of centered kernel alignment. Of (S, B, K) and (T, B, K) it is (B, S, T) in [-1, 1]; zero where
    a row is constant (always for K = 1). Of the K samples only the `counted` ones (K) take part.
    """
    dtype = torch.promote_types(student_similarity.dtype, teacher_similarity.dtype)
    student, teacher = (_centered(rows.to(dtype), counted) for rows in (student_similarity, teacher_similarity))
    with full_precision(student):
        return torch.einsum("sbk,tbk->bst", student, teacher)


def relative_distances(embeddings: Tensor, smallest: float = 0.0) -> Tensor:
    """Return the distances (..., B, B) of the samples of (..., B, C), in units of the batch's mean distance.

    At least in float32, zero on the diagonal; the gradient is zero, up to rounding, where two samples coincide. The
    unit is at least the `smallest`, which bounds the gradient.
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
        return distances / mean.clamp(min=max(smallest, limits.tiny**0.5))


def by_shape(function: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Apply a function of (L, ...) to tensors, stacked where shape and type are equal: one launch for many layers."""
    groups: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.shape, tensor.dtype), []).append(index)
    results: dict[int, Tensor] = {}
    for members in groups.values():
        stacked = torch.stack([tensors[index] for index in members])
        results |= dict(zip(members, function(stacked).unbind(), strict=True))
    return [results[index] for index in range(len(tensors))]


def _centered(rows: Tensor, counted: Tensor | None) -> Tensor:
    """Return rows less their mean, with unit length; those that are constant up to rounding come out as (nearly) zero.

    Entries that are not `counted` are zero before and after.
    """
    if counted is None:
        centered = rows - rows.mean(-1, keepdim=True)
    else:
        centered = (rows - rows.sum(-1, keepdim=True) / counted.sum().clamp(min=1)) * counted
    floor = (ROUNDING * rows.norm(dim=-1, keepdim=True)).clamp(min=1e-12)
    return centered / torch.maximum(centered.norm(dim=-1, keepdim=True), floor)
