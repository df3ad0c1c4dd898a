"""Averages of loss terms and association weights over a logging window, micro-batches and processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..losses.reduction import entropy

TERMS = ("task_loss", "logit_loss", "feature_loss")
# A weight this near to the largest possible one, the same for all samples, carries no information.
COLLAPSE_SHARE = 0.95
COLLAPSE_SPREAD = 0.01


@dataclass(frozen=True)
class WindowAverages:
    """What a logging window amounts to.

    Attributes:
        terms: The unweighted loss terms that were computed, and `association/entropy` in nats.
        association, spread: (S, T) mean and standard deviation of the weights; None without an association.
    """

    terms: dict[str, float]
    association: np.ndarray | None
    spread: np.ndarray | None

    def collapsed(self, upper_bound: float | None) -> bool:
        """Whether every student layer leans on one same teacher layer, to the bound, for every sample alike."""
        if self.association is None or self.spread is None or upper_bound is None or self.association.shape[1] < 2:
            return False
        winners = self.association.argmax(1)
        at_bound = self.association.max(1) >= COLLAPSE_SHARE * upper_bound
        return bool(at_bound.all() and (self.spread < COLLAPSE_SPREAD).all() and (winners == winners[0]).all())


class LossMeter:
    """Sums loss terms and association weights on the device, without waiting for it, until they are logged."""

    def __init__(self) -> None:
        self._terms: dict[str, Tensor] = {}
        self._association: Tensor | None = None
        self._shape: tuple[int, ...] = ()

    def add_term(self, name: str, share: Tensor) -> None:
        """Add a micro-batch's share of the window mean of a term (already divided by the window's items)."""
        share = _widened(share.detach())
        self._terms[name] = self._terms[name] + share if name in self._terms else share

    def add_association(self, weights: Tensor) -> None:
        """Add the association weights (B, S, T) of a micro-batch."""
        weights = _widened(weights.detach())
        sums = torch.stack([weights.sum(0), weights.square().sum(0)]).flatten()
        extra = torch.stack([weights.new_full((), float(len(weights))), entropy(weights).mean(1).sum()])
        packed = torch.cat([sums, extra])
        self._shape = tuple(weights.shape[1:])
        self._association = packed if self._association is None else self._association + packed

    @property
    def empty(self) -> bool:
        """Whether nothing was added since the last `average`."""
        return not self._terms and self._association is None

    def average(self, steps: int, reduce_sum: Callable[[Tensor], Tensor]) -> WindowAverages:
        """Return the averages over the optimizer steps since the last call, on all processes, and start anew."""
        names = [name for name in TERMS if name in self._terms]
        parts = [self._terms[name].reshape(1) for name in names]
        if self._association is not None:
            parts.append(self._association)
        sums = reduce_sum(torch.cat(parts)).cpu().double().numpy()
        terms = {name: float(sums[index]) / max(steps, 1) for index, name in enumerate(names)}
        association = spread = None
        if self._association is not None:
            association, spread, terms["association/entropy"] = self._unpack(sums[len(names) :])
        self._terms, self._association = {}, None
        return WindowAverages(terms, association, spread)

    def _unpack(self, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        samples = max(sums[-2], 1.0)
        mean, square = (part.reshape(self._shape) / samples for part in np.split(sums[:-2], 2))
        return mean, np.sqrt(np.clip(square - mean**2, 0, None)), float(sums[-1] / samples)


def _widened(tensor: Tensor) -> Tensor:
    """Return the tensor in the widest precision of its device: sums over long windows then lose nothing."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()
