"""The error of several student layers against the weighted teacher layers, without a tensor for each pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .functional import at_least_float32, full_precision

# On a CPU a few samples at a time: their targets then stay in its cache, and need no large allocation.
BLOCK_BYTES = 4 * 2**20


def weighted_feature_error(
    projected: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Tensor,
    mask: Tensor | None = None,
    *,
    centre: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return sum over t of weights_t * MSE(projected_s, target_t) for every sample and student layer.

    With the weighted mean target m_s = sum_t w_t y_t / W, W = sum_t w_t, that sum is W * |p_s - m_s|^2 plus what
    the targets spread about m_s, W / 2 * sum_tu (w_t / W) (w_u / W) |y_t - y_u|^2. Its gradient is 2 W (p_s - m_s) to
    the projection and the pair's own error to a weight. So backward keeps one difference (B, N, C) for each student
    layer, the distances between teacher layers are shared by all student layers, and nothing of the size
    (B, S, T, N, C) exists. The teacher layers' common part is taken off first, and distances are weighted
    instead of subtracting weighted squares: the textbook expansion loses all digits to outlier channels.

    Args:
        projected: S tensors (B, N, C) that carry the gradient; half precision is widened.
        targets: T tensors (B, N, C) without gradient.
        weights: (B, S, T), non-negative; may carry a gradient.
        mask: (B, N); positions with 0 do not count and get no gradient, whatever they hold.
        centre: (T, C) taken off the targets on the way; None for 0.
        scale: (T, C) that they are multiplied by then; None for 1.

    Returns:
        The weighted errors (B, S), and the errors of the pairs (B, S, T) without gradient; at least in float32.
    """
    kept = None if mask is None else mask != 0
    return _WeightedFeatureError.apply(weights, kept, centre, scale, len(projected), *projected, *targets)


class _Sums(NamedTuple):
    """What a block of samples gives: squares (B, S), inner products (B, S, T) and distances (B, T, T)."""

    fit: Tensor
    inner: Tensor
    distance: Tensor


class _WeightedFeatureError(torch.autograd.Function):
    """See `weighted_feature_error`, which is the way to call it."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        mask: Tensor | None,
        centre: Tensor | None,
        scale: Tensor | None,
        count: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        projected, targets = tensors[:count], tensors[count:]
        dtype = _common_dtype(projected, targets, centre)
        wide = weights.to(dtype)
        total = wide.sum(2)
        # Without any weight every mean has the gradient 0; that of all layers keeps the pair errors right.
        tiny = torch.finfo(dtype).tiny
        shares = torch.where(total.unsqueeze(2) > tiny, wide / total.clamp(min=tiny).unsqueeze(2), 1.0 / wide.shape[2])
        batch, positions, channels = projected[0].shape
        difference = torch.empty(batch, count, positions, channels, dtype=dtype, device=weights.device)
        with full_precision(weights):
            parts = [
                _block(projected, targets, shares, mask, centre, scale, rows, difference)
                for rows in _blocks(len(targets), difference)
            ]
            size = (
                difference.new_full((batch, 1), float(positions))
                if mask is None
                else mask.sum(1, keepdim=True).clamp(min=1).to(dtype)
            ) * channels
            sums = _Sums(*(torch.cat(entry) for entry in zip(*parts, strict=True)))
            fit, inner, distance = sums.fit / size, sums.inner / size[:, :, None], sums.distance / size[:, :, None]
            mixed = torch.bmm(shares, distance)
            spread = 0.5 * (mixed * shares).sum(2)
            # |p_s - y_t|^2 = |p_s - m_s|^2 + 2 <p_s - m_s, m_s - y_t> + |m_s - y_t|^2
            across = (shares * inner).sum(2, keepdim=True) - inner
            errors = (fit.unsqueeze(2) + 2.0 * across + mixed - spread.unsqueeze(2)).clamp(min=0.0)
            value = total * (fit + spread)
        ctx.save_for_backward(difference, 2.0 * total / size, errors)
        ctx.dtypes = [weights.dtype, *(entry.dtype for entry in projected)]
        ctx.mark_non_differentiable(errors)
        return value, errors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _errors: Tensor) -> tuple[Tensor | None, ...]:
        difference, factor, errors = ctx.saved_tensors
        step = gradient * factor
        count = difference.shape[1]
        to_weights = (gradient.unsqueeze(2) * errors).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        to_projected = [
            (difference[:, s] * step[:, s, None, None]).to(ctx.dtypes[1 + s]) if ctx.needs_input_grad[5 + s] else None
            for s in range(count)
        ]
        nothing = [None] * (len(ctx.needs_input_grad) - 5 - count)
        return to_weights, None, None, None, None, *to_projected, *nothing


def _block(
    projected: Sequence[Tensor],
    targets: Sequence[Tensor],
    shares: Tensor,
    mask: Tensor | None,
    centre: Tensor | None,
    scale: Tensor | None,
    rows: slice,
    difference: Tensor,
) -> _Sums:
    """Compare a few samples: write p_s - m_s into `difference`, and return what the errors are made of."""
    own = difference[rows]
    taught = torch.stack([target[rows] for target in targets], 1).to(own.dtype)
    if centre is not None:
        taught.sub_(centre[:, None, :])
    if scale is not None:
        taught.mul_(scale[:, None, :])
    common = taught.mean(1, keepdim=True)
    taught.sub_(common)
    hidden = None if mask is None else ~mask[rows, None, :, None]
    if hidden is not None:
        taught.masked_fill_(hidden, 0.0)
    flat = taught.flatten(2)
    own.copy_(common.expand_as(own))
    own.flatten(2).baddbmm_(shares[rows], flat)
    for s, entry in enumerate(projected):
        # In place, p - m: there is one large tensor for each student layer, and no other.
        own[:, s].neg_().add_(entry[rows])
    if hidden is not None:
        own.masked_fill_(hidden, 0.0)
    gram = torch.bmm(flat, flat.transpose(1, 2))
    squares = gram.diagonal(dim1=1, dim2=2)
    distance = (squares[:, :, None] + squares[:, None, :] - 2.0 * gram).clamp(min=0.0)
    fit = torch.linalg.vector_norm(own.flatten(2), dim=2).square()
    return _Sums(fit, torch.bmm(own.flatten(2), flat.transpose(1, 2)), distance)


def _blocks(layers: int, difference: Tensor) -> list[slice]:
    """Cut the batch into blocks: few samples on a CPU, all of them elsewhere."""
    batch, _, positions, channels = difference.shape
    size = batch
    if difference.device.type == "cpu":
        size = max(BLOCK_BYTES // max(layers * positions * channels * difference.element_size(), 1), 1)
    return [slice(start, min(start + size, batch)) for start in range(0, batch, max(size, 1))]


def _common_dtype(projected: Sequence[Tensor], targets: Sequence[Tensor], centre: Tensor | None) -> torch.dtype:
    """Return the widest of the precisions, and at least float32: squares overflow half precision."""
    dtype = at_least_float32(projected[0][:0]).dtype
    for other in (targets[0], *([] if centre is None else [centre])):
        dtype = torch.promote_types(dtype, at_least_float32(other[:0]).dtype)
    return dtype
