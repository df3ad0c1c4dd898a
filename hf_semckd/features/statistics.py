"""Running statistics of teacher channels, exact over accumulation steps, processes and resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .precision import at_least_float32

# A share of the layer's mean variance is added to each channel's: dead channels stay at zero instead of exploding.
VARIANCE_FLOOR = 1e-5
# A channel's own variance is averaged with the layer's mean variance, which weighs as much as this many positions.
PRIOR_POSITIONS = 256
# Layers are updated together up to this size: a single layer is launch-bound on a GPU, and a CPU's cache is small.
GROUP_BYTES = {"cpu": 4 * 2**20}
OTHER_GROUP_BYTES = 64 * 2**20


class ChannelStatistics(nn.Module):
    """Mean and variance of every channel of one teacher layer, over all samples seen so far.

    A frozen teacher's features do not drift, so all samples weigh the same. Moments are merged once per optimizer
    step, after a sum over processes: a step is standardized alike, however it is cut into micro-batches.

    Attributes:
        mean, variance: (channels) buffers, at least float32 even when the module around them is cast below that.
        count: Number of positions behind them; 0 before the first merge.
        collected: (1 + 2 * channels) moments collected since the last merge, or None.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("count", torch.zeros(()))
        self.collected: Tensor | None = None

    def pending(self) -> Tensor:
        """Return and forget the collected moments, which may be added over processes; zeros for none."""
        pending, self.collected = self.collected, None
        device = self.mean.device
        return torch.zeros(1 + 2 * len(self.mean), device=device, dtype=_wide(device)) if pending is None else pending

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, C, H, W) or (B, N, C) with every channel standardized, in the statistics' precision or wider."""
        shape = (-1, 1, 1) if features.dim() == 4 else (-1,)
        return (at_least_float32(features) - self.mean.view(shape)) * standardization([self])[1][0].view(shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ChannelStatistics:
        # Engines cast whole modules to bfloat16, in which a count stops growing at a few hundred.
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else at_least_float32(buffer)
        return self


class TeacherStatistics(nn.ModuleList):
    """The statistics of several teacher layers, updated together; empty where targets are compared raw."""

    def __init__(self, channels: Sequence[int]):
        super().__init__(map(ChannelStatistics, channels))

    @property
    def layers(self) -> list[ChannelStatistics]:
        """The statistics of each layer."""
        return [entry for entry in self if isinstance(entry, ChannelStatistics)]

    @property
    def missing(self) -> bool:
        """Whether a layer has no statistics yet; a host sync."""
        return any(not bool(entry.count > 0) for entry in self.layers)

    def synchronize(self, reduce_sum: Callable[[Tensor], Tensor] | None = None) -> None:
        """Merge the collected moments, summed over processes in one reduction; see `FeatureLoss.synchronize`."""
        layers = self.layers
        if not layers:
            return
        pending = [entry.pending() for entry in layers]
        sums = torch.cat(pending) if reduce_sum is None else reduce_sum(torch.cat(pending))
        merge_layers(layers, sums.split([len(entry) for entry in pending]))


@torch.no_grad()
def update_layer_statistics(
    layers: Sequence[ChannelStatistics], features: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> None:
    """Collect the moments of a batch for several layers, those of one shape together.

    Features are (B, C, H, W) or (B, N, C); positions whose mask (B, N) is 0 are left out. Equal masks are one object.
    """
    values = [entry.flatten(2).transpose(1, 2) if entry.dim() == 4 else entry for entry in features]
    looks = [(entry.shape, entry.dtype, id(mask)) for entry, mask in zip(values, masks, strict=True)]
    for members in _groups(looks, values):
        # (L, positions, C)
        rows = torch.stack([values[index] for index in members]).flatten(1, 2)
        found = _moments([layers[index] for index in members], rows, masks[members[0]])
        for index, moments in zip(members, found.unbind(), strict=True):
            before = layers[index].collected
            layers[index].collected = moments if before is None else before + moments


@torch.no_grad()
def merge_layers(layers: Sequence[ChannelStatistics], sums: Sequence[Tensor]) -> None:
    """Merge each layer's `pending` moments, added over processes, into its mean and variance (Chan et al., 1979)."""
    for members in _groups([(len(layer.mean), layer.mean.dtype) for layer in layers]):
        entries = [layers[index] for index in members]
        wide = _wide(entries[0].mean.device)
        mean, variance, before = (values.to(entries[0].mean.device, wide) for values in _state(entries))
        moments = torch.stack([sums[index] for index in members]).to(mean.dtype)
        added, shift_sum, square_sum = moments.split([1, mean.shape[1], mean.shape[1]], dim=1)
        total = (before + added).clamp(min=1)
        # The sums are taken about the running mean, so the shift of the mean is all that has to be corrected for.
        shift = shift_sum / total
        squares = variance * before + square_sum - total * shift.square()
        seen = added > 0
        mean = torch.where(seen, mean + shift, mean)
        variance = torch.where(seen, (squares / total).clamp(min=0), variance)
        for name, values in (("mean", mean), ("variance", variance), ("count", (before + added).squeeze(1))):
            buffers = [getattr(entry, name) for entry in entries]
            torch._foreach_copy_(buffers, list(values.to(buffers[0].dtype).unbind()))


def standardization(layers: Sequence[ChannelStatistics]) -> tuple[Tensor, Tensor]:
    """Return each channel's mean and the factor that follows its subtraction, (L, channels) for L layers of one width.

    A channel that was silent in a few samples would be blown up by the first one that activates it: each variance is
    shrunk to the layer's mean with the weight of `PRIOR_POSITIONS` positions, which fades as more are seen.
    """
    mean, variance, count = _state(layers)
    typical = variance.mean(1, keepdim=True)
    shrunk = (count * variance + PRIOR_POSITIONS * typical) / (count + PRIOR_POSITIONS)
    # Where nothing varies (one position in all), differences from the mean are its rounding, and not to be blown up.
    limits = torch.finfo(variance.dtype)
    rounding = (limits.eps * mean).square()
    return mean, torch.rsqrt(shrunk + VARIANCE_FLOOR * typical + rounding + limits.tiny)


def _wide(device: torch.device) -> torch.dtype:
    """Return the widest precision of a device, that of sums."""
    return torch.float32 if device.type == "mps" else torch.float64


def _state(layers: Sequence[ChannelStatistics]) -> tuple[Tensor, Tensor, Tensor]:
    """Return means and variances (L, channels) and counts (L, 1) of layers of one width."""
    mean, variance = (torch.stack([getattr(layer, name) for layer in layers]) for name in ("mean", "variance"))
    return mean, variance, torch.stack([layer.count for layer in layers]).unsqueeze(1)


def _moments(layers: Sequence[ChannelStatistics], rows: Tensor, mask: Tensor | None) -> Tensor:
    """Return count, sum and sum of squares about the mean (L, 1 + 2 * channels) of rows (L, positions, channels)."""
    device = layers[0].mean.device
    wide = _wide(device)
    running, _, before = _state(layers)
    rows = at_least_float32(rows).to(running.dtype)
    if mask is None:
        count = torch.full((), float(rows.shape[1]), device=device, dtype=wide)
        mean = rows.mean(1)
    else:
        left_out = (mask == 0).flatten().unsqueeze(1)
        count = (mask != 0).sum().to(device, wide)
        # A masked position may hold anything, NaN included: select, do not multiply.
        mean = rows.masked_fill(left_out, 0.0).sum(1) / count.clamp(min=1).to(rows.dtype)
    # About the running mean, or at first about the batch's own: sums of squares about 0 would cancel on channels
    # with an offset.
    center = torch.where(before > 0, running, mean)
    rows = rows - center.unsqueeze(1)
    if mask is not None:
        rows.masked_fill_(left_out, 0.0)
    sums, squares = rows.sum(1).to(device, wide), rows.square().sum(1).to(device, wide)
    shift = (center - running).to(device, wide)
    squares = squares + shift * (2 * sums + count * shift)
    return torch.cat([count.expand(len(layers), 1), sums + count * shift, squares], 1)


def _groups(looks: Sequence[object], values: Sequence[Tensor] | None = None) -> Iterator[list[int]]:
    """Yield the places of equal entries, few enough of them for their values to be taken together."""
    places: dict[object, list[int]] = {}
    for index, look in enumerate(looks):
        places.setdefault(look, []).append(index)
    for members in places.values():
        size = len(members)
        if values is not None:
            first = values[members[0]]
            limit = GROUP_BYTES.get(first.device.type, OTHER_GROUP_BYTES)
            size = max(limit // max(first.numel() * first.element_size(), 1), 1)
        yield from (members[start : start + size] for start in range(0, len(members), size))
