"""A bank of the latest samples, so that similarities depend neither on the micro-batch nor on its size."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from ...features.precision import at_least_float32, full_precision
from ..similarity import by_shape


class SimilarityBank(nn.Module):
    """The latest samples of a training, by what is known of them in every layer; see `SimilarityAssociation`.

    It changes once an optimizer step, by all samples of that step on all processes: a sample's similarities to it are
    the same however the step is cut. Teacher features do not change; student features are as old as their sample.

    Args:
        size: Number of samples K that are kept.
        widths: Width of the summaries of each layer.

    Attributes:
        rows: (K, sum of widths) a unit vector for every layer of every sample, joined; zeros where there is none yet.
        seen: Number of samples so far; the next one takes the place `seen % K`.
    """

    rows: Tensor
    seen: Tensor

    def __init__(self, size: int, widths: Sequence[int]):
        super().__init__()
        self.widths = list(widths)
        self.register_buffer("rows", torch.zeros(size, sum(widths)))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.forget_collected()

    def forget_collected(self) -> None:
        """Forget the samples that were met since the last `synchronize`."""
        self._collected: list[Tensor] = []
        self._counts: list[int] = []

    def forward(self, summaries: Sequence[Tensor]) -> list[Tensor]:
        """Return each layer's cosines (B, K) of samples with those of the bank; 0 where there is none.

        `summaries` are (B, D) for each layer. While training, the samples are collected for the next `synchronize`.
        """
        widths = [rows.shape[1] for rows in summaries]
        if widths != self.widths:
            raise InputError(
                "The layers have other sizes than those that the bank of samples was built for",
                received=f"summaries of {widths} values",
                expected=f"{self.widths}",
                todo="use one image size for all batches, or association_bank=0",
            )
        units = by_shape(lambda rows: F.normalize(rows, dim=-1), [at_least_float32(rows) for rows in summaries])
        if self.training:
            self._counts.append(len(units[0]))
            self._collected.append(torch.cat(units, 1)[-len(self.rows) :])
        known = at_least_float32(self.rows).split(self.widths, 1)
        size = len(units[0])

        def cosines(both: Tensor) -> Tensor:
            return both[:, :size] @ both[:, size:].mT

        with full_precision(self.rows):
            return by_shape(cosines, [torch.cat(pair) for pair in zip(units, known, strict=True)])

    @property
    def filled(self) -> Tensor:
        """Which places hold a sample (K)."""
        return torch.arange(len(self.rows), device=self.seen.device) < self.seen

    @torch.no_grad()
    def synchronize(self, reduce_sum: Callable[[Tensor], Tensor] | None, rank: int, world: int) -> None:
        """Take up the samples of an optimizer step, in the order of micro-batches, processes and samples."""
        if not self._collected:
            return
        device, size = self.rows.device, len(self.rows)
        counts = torch.zeros(len(self._counts), world, dtype=torch.long, device=device)
        for batch, count in enumerate(self._counts):
            counts[batch, rank] = count  # A tensor made of the list would be a host sync.
        if reduce_sum is not None:
            counts = reduce_sum(counts)
        ends = counts.flatten().cumsum(0)
        starts = (ends - counts.flatten()).view_as(counts)[:, rank]
        order = torch.cat([starts[m] + torch.arange(n, device=device) for m, n in enumerate(self._counts)])
        rows = torch.cat(self._collected)[-size:].to(self.rows.dtype)
        order = order[-len(rows) :]
        places = (self.seen + order) % size
        if world == 1 or reduce_sum is None:
            self.rows.index_copy_(0, places, rows)
        else:
            # What is older than the last K goes to a place after the others, which is left out.
            places = torch.where(order >= ends[-1] - size, places, size)
            update = rows.new_zeros(size + 1, rows.shape[1] + 1).index_copy_(0, places, F.pad(rows, (0, 1), value=1.0))
            update = reduce_sum(update)
            self.rows.copy_(torch.where(update[:size, -1:] > 0, update[:size, :-1], self.rows))
        self.seen += ends[-1]
        self.forget_collected()
