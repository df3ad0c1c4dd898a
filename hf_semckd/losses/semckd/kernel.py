"""The error of several student layers against the weighted teacher layers, without a tensor for each pair."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...features.precision import full_precision
from ..similarity import by_shape, relative_distances

# On a CPU a few samples at a time: their targets then stay in its cache, and need no large allocation.
BLOCK_BYTES = 4 * 2**20
# Where layers are projected one by one: products of stacked matrices take nearly twice as long there. On a GPU a
# single layer is launch-bound.
UNSTACKED_DEVICES = ("cpu",)


def weighted_feature_error(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Tensor,
    mask: Tensor | None = None,
    *,
    projections: Sequence[tuple[Tensor, Tensor]] | None = None,
    center: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return sum over t of weights_t * MSE(p_s, target_t) for every sample and student layer, p_s its projection.

    With the weighted mean target m_s = sum_t w_t y_t / W, W = sum_t w_t, that sum is W * |p_s - m_s|^2 plus the spread
    of the targets about m_s, W / 2 * sum_tu (w_t / W) (w_u / W) |y_t - y_u|^2. Its gradient is 2 W (p_s - m_s) to the
    projected features and the pair's own error to a weight. So backward keeps one difference (B, N, C) per student
    layer, all student layers share the distances between teacher layers, and nothing of the size (B, S, T, N, C)
    exists, not even the projected features. The teacher layers' mean is subtracted first, and distances are weighted
    instead of subtracting weighted squares: the textbook expansion loses all digits to outlier channels.

    Args:
        features: S tensors (B, N, D_s) that carry the gradient; of width C without projections.
        targets: T tensors (B, N, C) without gradient.
        weights: (B, S, T), non-negative; may carry a gradient.
        mask: (B, N); positions with 0 do not count and get no gradient, whatever they hold.
        projections: For each student layer a weight (C, D_s) and a bias (C), applied first, in autocast's precision
            where that is on; layers may share them.
        center: (T, C) subtracted from the targets; None for 0.
        scale: (T, C) factor of the centered targets; None for 1.

    Returns:
        The weighted errors (B, S), and the errors of the pairs (B, S, T) without gradient; at least in float32.
    """
    kept = None if mask is None else mask != 0
    linear = [] if projections is None else [entry for pair in zip(*projections, strict=True) for entry in pair]
    return _WeightedFeatureError.apply(weights, kept, center, scale, len(features), *features, *linear, *targets)


def weighted_relation_error(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Tensor, smallest: float = 0.0
) -> Tensor:
    """Return the error of each sample's distances to the other samples of the batch.

    error[i, s] = sum over t of weights[i, s, t] * mean over the other samples j of (d_s[i, j] - d_t[i, j])^2, with
    `relative_distances` d of S and T embeddings (B, C). It needs no projection, and depends on neither layer's scale,
    rotation or offset. The result (B, S) is 0 for a batch of one, and its gradient goes to the student alone;
    `smallest` is that of its distances.
    """
    own = [rows.unsqueeze(1) for rows in by_shape(partial(relative_distances, smallest=smallest), student)]
    with torch.no_grad():
        theirs = [rows.unsqueeze(1) for rows in by_shape(relative_distances, teacher)]
    samples = len(own[0])
    # The mean there is over all samples; a sample's distance to itself is 0 everywhere.
    return weighted_feature_error(own, theirs, weights.detach())[0] * (samples / max(samples - 1, 1))


class _Sums(NamedTuple):
    """Of a block of samples: squares (B, S), inner products (B, S, T) and distances (B, T, T)."""

    fit: Tensor
    inner: Tensor
    distance: Tensor


class _WeightedFeatureError(torch.autograd.Function):
    """The autograd function of `weighted_feature_error`."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        mask: Tensor | None,
        center: Tensor | None,
        scale: Tensor | None,
        count: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        layers = weights.shape[2]
        features, linear, targets = tensors[:count], tensors[count:-layers], tensors[-layers:]
        narrow = _narrow_dtype(features[0], linear)
        dtype = _wide_dtype([*features, *linear, *targets, *([] if center is None else [center])])
        wide = weights.to(dtype)
        total = wide.sum(2)
        # Without any weight every mean has the gradient 0; that of all layers keeps the pair errors right.
        tiny = torch.finfo(dtype).tiny
        shares = torch.where(total.unsqueeze(2) > tiny, wide / total.clamp(min=tiny).unsqueeze(2), 1.0 / layers)
        batch, positions, channels = targets[0].shape
        difference = torch.empty(batch, count, positions, channels, dtype=dtype, device=weights.device)
        project = _projector(features, linear, narrow)
        with full_precision(weights):
            parts = []
            for rows in _blocks(layers, difference):
                taught, common = _taught(targets, rows, dtype, center, scale, mask)
                own = _subtract_means(difference[rows], shares[rows], taught, common)
                project(rows, own)
                if mask is not None:
                    own.masked_fill_(~mask[rows, None, :, None], 0.0)
                parts.append(_sums(own, taught))
            size = _counted(mask, batch, positions, difference) * channels
            value, errors = _errors(_Sums(*(torch.cat(entry) for entry in zip(*parts, strict=True))), shares, size)
        # With a projection its inputs are needed again; without one the difference is the gradient itself.
        ctx.save_for_backward(difference, 2.0 * total / size, errors, mask, *(tensors[:-layers] if linear else ()))
        ctx.layers, ctx.narrow = layers, narrow
        ctx.dtypes = [weights.dtype, *(entry.dtype for entry in features)]
        ctx.mark_non_differentiable(errors)
        return total * value, errors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _errors: Tensor) -> tuple[Tensor | None, ...]:
        difference, factor, errors, mask, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[5:]
        to_weights = (gradient.unsqueeze(2) * errors).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        step = gradient * factor
        results: list[Tensor | None]
        with full_precision(gradient):
            if not saved:
                towards = (difference * step[:, :, None, None]).unbind(1)
                results = [
                    entry.to(dtype) if need else None
                    for entry, dtype, need in zip(towards, ctx.dtypes[1:], needed, strict=False)
                ]
            else:
                results = _gradients(difference, step, mask, saved, needed, ctx.narrow)
        return to_weights, None, None, None, None, *results, *[None] * ctx.layers


def _projector(
    features: Sequence[Tensor], linear: Sequence[Tensor], narrow: torch.dtype
) -> Callable[[slice, Tensor], object]:
    """Return a function that adds the projections of some samples to a tensor (b, S, N, C)."""
    if not linear:
        return lambda rows, own: own.add_(torch.stack([feature[rows] for feature in features], 1))
    weights, biases = linear[: len(features)], linear[len(features) :]
    parts = [
        (group, torch.stack(list(biases[group])).to(narrow).unsqueeze(1), torch.stack(list(weights[group])).to(narrow))
        for group in _groups([*features, *linear])
    ]

    def project(rows: slice, own: Tensor) -> None:
        for group, bias, weight in parts:
            values = torch.stack([feature[rows].to(narrow) for feature in features[group]]).flatten(1, 2)
            projected = torch.baddbmm(bias, values, weight.mT)
            own[:, group].add_(projected.unflatten(1, (len(own), -1)).transpose(0, 1))

    return project


def _groups(tensors: Sequence[Tensor]) -> list[slice]:
    """Return which of S layers are stacked, given their features, weights and biases: all, or none."""
    count = len(tensors) // 3
    kinds = (tensors[first : first + count] for first in (0, count, 2 * count))
    alike = all(len({(entry.shape, entry.dtype) for entry in kind}) == 1 for kind in kinds)
    if alike and tensors[0].device.type not in UNSTACKED_DEVICES:
        return [slice(0, count)]
    return [slice(s, s + 1) for s in range(count)]


def _gradients(
    difference: Tensor,
    step: Tensor,
    mask: Tensor | None,
    saved: Sequence[Tensor],
    needed: Sequence[bool],
    narrow: torch.dtype,
) -> list[Tensor | None]:
    """Return the gradients of S features, weights and biases; None where none is needed."""
    count = len(saved) // 3
    found: list[list[Tensor | None]] = [[None] * count for _ in range(3)]
    for group in _groups(saved):
        features, weights, biases = (saved[k * count : (k + 1) * count][group] for k in range(3))
        wanted = [any(needed[k * count : (k + 1) * count][group]) for k in range(3)]
        towards = difference[:, group] * step[:, group, None, None]
        # (S', B * N, C)
        cast = towards.transpose(0, 1).to(narrow).flatten(1, 2)
        if wanted[0]:
            own = (cast @ torch.stack(list(weights)).to(narrow)).unflatten(1, features[0].shape[:2])
            found[0][group] = own.to(features[0].dtype).unbind()
        if wanted[1]:
            values = torch.stack(list(features))
            if mask is not None:
                # Zero times a masked value must be zero, also if it is NaN.
                values.masked_fill_(~mask[..., None], 0.0)
            found[1][group] = (cast.mT @ values.flatten(1, 2).to(narrow)).to(weights[0].dtype).unbind()
        if wanted[2]:
            found[2][group] = towards.sum((0, 2)).to(biases[0].dtype).unbind()
    results = [entry for kind in found for entry in kind]
    return [entry if need else None for entry, need in zip(results, needed, strict=False)]


def _taught(
    targets: Sequence[Tensor],
    rows: slice,
    dtype: torch.dtype,
    center: Tensor | None,
    scale: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return a few samples' targets (b, T, N, C) minus their mean over layers, and that mean (b, 1, N, C)."""
    taught = torch.stack([target[rows] for target in targets], 1).to(dtype)
    if center is not None:
        taught.sub_(center[:, None, :])
    if scale is not None:
        taught.mul_(scale[:, None, :])
    common = taught.mean(1, keepdim=True)
    taught.sub_(common)
    if mask is not None:
        taught.masked_fill_(~mask[rows, None, :, None], 0.0)
    return taught, common


def _subtract_means(own: Tensor, shares: Tensor, taught: Tensor, common: Tensor) -> Tensor:
    """Write minus the weighted mean targets into `own` (b, S, N, C), the only large tensor."""
    own.copy_(common.expand_as(own))
    own.flatten(2).baddbmm_(shares, taught.flatten(2))
    return own.neg_()


def _sums(own: Tensor, taught: Tensor) -> _Sums:
    """Return the sums of the differences p_s - m_s and the centered targets that errors consist of."""
    differences, rows = own.flatten(2), taught.flatten(2)
    gram = torch.bmm(rows, rows.transpose(1, 2))
    squares = gram.diagonal(dim1=1, dim2=2)
    distance = (squares[:, :, None] + squares[:, None, :] - 2.0 * gram).clamp(min=0.0)
    fit = torch.linalg.vector_norm(differences, dim=2).square()
    return _Sums(fit, torch.bmm(differences, rows.transpose(1, 2)), distance)


def _errors(sums: _Sums, shares: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted mean of the pair errors (B, S) and these (B, S, T)."""
    fit, inner, distance = sums.fit / size, sums.inner / size[:, :, None], sums.distance / size[:, :, None]
    mixed = torch.bmm(shares, distance)
    spread = 0.5 * (mixed * shares).sum(2)
    # |p_s - y_t|^2 = |p_s - m_s|^2 + 2 <p_s - m_s, m_s - y_t> + |m_s - y_t|^2
    across = (shares * inner).sum(2, keepdim=True) - inner
    errors = (fit.unsqueeze(2) + 2.0 * across + mixed - spread.unsqueeze(2)).clamp(min=0.0)
    return fit + spread, errors


def _counted(mask: Tensor | None, batch: int, positions: int, like: Tensor) -> Tensor:
    """Return how many positions of each sample count (B, 1)."""
    if mask is None:
        return like.new_full((batch, 1), float(positions))
    return mask.sum(1, keepdim=True).clamp(min=1).to(like.dtype)


def _narrow_dtype(feature: Tensor, linear: Sequence[Tensor]) -> torch.dtype:
    """Return the precision of the projections: autocast's, or that of their weights."""
    if not linear:
        return feature.dtype
    device = feature.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else linear[0].dtype


def _wide_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the widest of the precisions, and at least float32: squares overflow half precision."""
    return torch.float64 if any(entry.dtype == torch.float64 for entry in tensors) else torch.float32


def _blocks(layers: int, difference: Tensor) -> list[slice]:
    """Cut the batch into blocks: few samples on a CPU, all of them elsewhere."""
    batch, _, positions, channels = difference.shape
    size = batch
    if difference.device.type == "cpu":
        size = max(BLOCK_BYTES // max(layers * positions * channels * difference.element_size(), 1), 1)
    return [slice(start, min(start + size, batch)) for start in range(0, batch, max(size, 1))]
