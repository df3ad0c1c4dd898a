"""Means over the positions that count, and regression at them."""

import torch
from torch import Tensor, nn

from ..features.precision import at_least_float32


def zero_masked(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Return tokens (B, N, C), zero and without gradient where the mask (B, N) is 0, whatever they hold."""
    return tokens if mask is None else tokens.masked_fill(mask.unsqueeze(-1) == 0, 0.0)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Average (B, N) values over the positions of each sample whose mask is 1; zero where there is none."""
    if mask is None:
        return values.mean(1)
    mask = mask.to(values.dtype)
    # A masked position may hold anything, NaN included (attention over nothing): select, do not multiply.
    kept = torch.where(mask > 0, values, torch.zeros_like(values))
    return kept.sum(1) / mask.sum(1).clamp(min=1)


def squared_error(projected: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared error (B) of tokens (B, N, C), at least in float32: squares overflow half precision.

    Positions whose mask (B, N) is 0 do not count and get no gradient, whatever they hold.
    """
    difference = at_least_float32(projected) - target
    if mask is not None:
        difference.masked_fill_(mask.unsqueeze(-1) == 0, 0.0)
    return masked_mean(difference.square().mean(-1), mask)


def regress(regressor: nn.Module, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the regressor's output (..., C_t) for features (..., C_s), computed in the type of its weights.

    Masked positions enter as zeros: zeroing their error alone would leave a weight's gradient of 0 times the feature.
    """
    return regressor(zero_masked(tokens, mask).to(next(regressor.parameters()).dtype))


def entropy(weights: Tensor) -> Tensor:
    """Return the entropy in nats of weights (..., T): log T when uniform, 0 when all lies on one layer."""
    return torch.special.entr(weights).sum(-1)
