"""Tokens drawn from a teacher's distributions, as tensors of a row: `drawn` (N, K, bytes) and `entropy` (N)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...losses.sampled_logits import SampledLogits, TokenSampling

DRAWN, ENTROPY = "drawn", "entropy"


def draw(logits: Tensor, sampling: TokenSampling, key: bytes) -> dict[str, Tensor]:
    """Return what is stored of a sample's logits (N, V): the same for the same key."""
    ids, entropy = sampling(logits, int.from_bytes(key[:8], "big"))
    return {DRAWN: _packed(ids, _id_bytes(sampling.vocabulary)), ENTROPY: entropy.float()}


def drawn_logits(drawn: Tensor, entropy: Tensor) -> SampledLogits:
    """Return what was stored of the samples of a batch."""
    return SampledLogits(_unpacked(drawn), entropy)


def are_draws(values: Mapping[str, Tensor], sampling: TokenSampling) -> bool:
    """Whether tensors of a row can be draws of this kind. An id beyond the vocabulary would end a process on CUDA."""
    drawn, entropy = values.get(DRAWN), values.get(ENTROPY)
    if drawn is None or entropy is None or drawn.dtype != torch.uint8 or entropy.dtype != torch.float32:
        return False
    if drawn.dim() != 3 or drawn.shape[1:] != (sampling.draws, _id_bytes(sampling.vocabulary)):
        return False
    known = bool((_unpacked(drawn) < sampling.vocabulary).all())
    return known and entropy.shape == drawn.shape[:1] and bool(entropy.isfinite().all())


def _id_bytes(vocabulary: int) -> int:
    """Return how many bytes the largest id takes."""
    return max(-(-(vocabulary - 1).bit_length() // 8), 1)


def _packed(ids: Tensor, size: int) -> Tensor:
    """Return ids (...) as bytes (..., size), the lowest first."""
    return torch.stack([ids >> 8 * place & 255 for place in range(size)], dim=-1).to(torch.uint8)


def _unpacked(packed: Tensor) -> Tensor:
    places = packed.long().unbind(-1)
    return torch.stack([value << 8 * place for place, value in enumerate(places)]).sum(0)
