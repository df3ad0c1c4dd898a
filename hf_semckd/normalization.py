"""Running statistics of teacher channels, exact over accumulation steps, processes and resume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .functional import at_least_float32

# A share of the layer's mean variance is added to each channel's: dead channels stay at zero instead of exploding.
VARIANCE_FLOOR = 1e-5
# What a channel's own variance weighs against at first: a prior of this many positions.
PRIOR_POSITIONS = 256


class ChannelStatistics(nn.Module):
    """Mean and variance of every channel of one teacher layer, over all samples seen so far.

    A frozen teacher's features do not drift, so all samples weigh the same: there is no momentum to choose. What a
    forward pass observes is kept aside and merged once an optimizer step, after a sum over processes; all
    micro-batches of a step are therefore standardised alike, however a step is cut into micro-batches.

    Args:
        channels: Number of channels.

    Attributes:
        mean, variance: (channels) buffers, float32 or wider even when the module around them is cast to half
            precision.
        count: Number of positions behind them; 0 before the first merge.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("count", torch.zeros(()))
        self._pending: Tensor | None = None

    @torch.no_grad()
    def observe(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Keep the moments of a batch aside until the next `merge`.

        Args:
            features: (B, C, H, W) or (B, N, C).
            mask: (B, N); positions with 0 are left out.
        """
        moments = self.moments(features, mask)
        self._pending = moments if self._pending is None else self._pending + moments

    def pending(self) -> Tensor:
        """Return and forget what was observed: (1 + 2 * channels) sums that may be added over processes."""
        pending, self._pending = self._pending, None
        return torch.zeros(1 + 2 * len(self.mean), **self._wide()) if pending is None else pending

    @torch.no_grad()
    def merge(self, sums: Tensor) -> None:
        """Take summed moments (of all processes) into the running mean and variance (Chan et al., 1979).

        Args:
            sums: What `pending` returned, added over processes.
        """
        sums = sums.to(**self._wide())
        added, shift_sum, square_sum = sums[0], sums[1 : 1 + len(self.mean)], sums[1 + len(self.mean) :]
        before = self.count.to(sums.dtype)
        total = (before + added).clamp(min=1)
        # The sums are taken about the running mean, so the shift of the mean is all that has to be corrected for.
        shift = shift_sum / total
        squares = self.variance.to(sums.dtype) * before + square_sum - total * shift.square()
        seen = added > 0
        self.mean.copy_(torch.where(seen, self.mean.to(sums.dtype) + shift, self.mean.to(sums.dtype)))
        self.variance.copy_(torch.where(seen, (squares / total).clamp(min=0), self.variance.to(sums.dtype)))
        self.count.add_(added.to(self.count.dtype))

    def forward(self, features: Tensor) -> Tensor:
        """Return the features with every channel standardised, in the statistics' precision or wider.

        Args:
            features: (B, C, H, W) or (B, N, C).
        """
        shape = (-1, 1, 1) if features.dim() == 4 else (-1,)
        return (at_least_float32(features) - self.mean.view(shape)) * self.scale().view(shape)

    def scale(self) -> Tensor:
        """Return what each channel (channels) is multiplied by, once its mean is taken off."""
        return torch.rsqrt(self.shrunk_variance())

    def shrunk_variance(self) -> Tensor:
        """Return each channel's variance (channels), drawn to the layer's mean variance while little was seen.

        A channel that was silent in a few samples would otherwise be blown up by the first one that wakes it. The
        pull is that of `PRIOR_POSITIONS` positions with the mean variance, and fades as more are seen.
        """
        typical = self.variance.mean()
        shrunk = (self.count * self.variance + PRIOR_POSITIONS * typical) / (self.count + PRIOR_POSITIONS)
        return shrunk + VARIANCE_FLOOR * typical + torch.finfo(self.variance.dtype).tiny

    def moments(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Return count, sum and sum of squares about the running mean, packed into (1 + 2 * channels)."""
        values = features.flatten(2).transpose(1, 2) if features.dim() == 4 else features
        rows = at_least_float32(values).to(self.mean.dtype).flatten(0, 1)
        if mask is None:
            count = torch.full((), float(len(rows)), **self._wide())
            centre = torch.where(self.count > 0, self.mean, rows.mean(0))
        else:
            kept = (mask != 0).flatten().unsqueeze(1)
            count = kept.sum().to(**self._wide())
            # A masked position may hold anything, NaN included: select, do not multiply.
            mean = torch.where(kept, rows, 0.0).sum(0) / count.clamp(min=1).to(rows.dtype)
            centre = torch.where(self.count > 0, self.mean, mean)
        # About the running mean, or at first about the batch's own: sums of squares about 0 would cancel on channels
        # with an offset.
        rows = rows - centre
        if mask is not None:
            rows.masked_fill_(~kept, 0.0)
        sums, squares = rows.sum(0).to(**self._wide()), rows.square().sum(0).to(**self._wide())
        shift = centre.to(**self._wide()) - self.mean.to(**self._wide())
        return torch.cat([count[None], sums + count * shift, squares + 2 * shift * sums + count * shift.square()])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ChannelStatistics:
        # Engines cast whole modules to bfloat16, in which a count stops growing at a few hundred.
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else at_least_float32(buffer)
        return self

    def _wide(self) -> dict[str, Any]:
        device = self.mean.device
        return {"device": device, "dtype": torch.float32 if device.type == "mps" else torch.float64}
