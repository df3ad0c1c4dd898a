"""Systematic sampling of tokens, the same ones whenever a sample comes again."""

import torch
from torch import Tensor

# An odd factor near 2^32 / golden ratio: neighboring sums land far apart (Knuth's multiplicative hashing).
SPREADING_FACTOR = 2654435761
PHASES = 2**24
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def content_phase(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return a number in [0, 1) per sample (B), float32, that depends on its content only; no host sync.

    A random draw would differ between a run, its continuation, another cut into micro-batches and a cache. `values`
    (B, ...) are token ids, whose padding does not count, or pixels.
    """
    if values.is_floating_point():
        values = values.contiguous().view(INTEGERS[values.element_size()])
    values = values.long()
    # The low half of doubles that were floats once is empty.
    values = values ^ (values >> 32)
    if mask is not None and mask.shape == values.shape:
        values = values * (mask != 0)
    total = values.flatten(1).sum(1)
    return ((total * SPREADING_FACTOR) % 2**32 // (2**32 // PHASES)).float() / PHASES


def spread_positions(
    length: int, limit: int, *, mask: Tensor | None = None, phase: Tensor | None = None, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Choose some of each sample's tokens at even distances (systematic sampling).

    A sample with n tokens gets m = min(n, limit) of them: those of rank floor((k + phase) * n / m). Over all phases
    every token is equally likely, so the mean over the chosen ones is an unbiased estimate.

    `length` N counts padding, where the mask (B, N) is 0; `phase` (B) is `content_phase`, None for 0; `like` is any
    tensor of the batch, for size and device. Returns positions (B, K), K = min(N, limit), the chosen ones first, and
    their mask (B, K), None when all were chosen.
    """
    batch, device = len(like), like.device
    width = min(length, limit)
    steps = torch.arange(width, device=device)
    tokens = torch.full((batch, 1), length, device=device) if mask is None else (mask != 0).sum(1, keepdim=True)
    chosen = tokens.clamp(min=1, max=width)
    # In whole numbers: rounding a rank up would choose another token, or padding.
    offset = steps.new_zeros(batch, 1) if phase is None else (phase * PHASES).long().unsqueeze(1)
    ranks = ((steps * PHASES + offset) * tokens // (chosen * PHASES)).clamp(max=length - 1)
    if mask is None:
        return ranks, None
    order = torch.argsort((mask != 0).to(torch.uint8), dim=1, descending=True, stable=True)
    return order.gather(1, ranks), (steps < chosen) & (tokens > 0)


def flat_positions(positions: Tensor, length: int) -> Tensor:
    """Return positions (B, K) in samples of that length as positions (B * K) in the flattened batch."""
    first = length * torch.arange(len(positions), device=positions.device).unsqueeze(1)
    return (positions + first).flatten()


def take_positions(tokens: Tensor, flat: Tensor) -> Tensor:
    """Return the tokens (B, K, C) of (B, N, C) at `flat_positions` (B * K), which layers of one length share."""
    return tokens.flatten(0, 1).index_select(0, flat).view(len(tokens), -1, tokens.shape[2])
