"""Precision of intermediate results."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen half-precision tensors to float32 and leave wider ones (float64 included) as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def smallest_length(dtype: torch.dtype) -> float:
    """Return the length from which features of a precision have a direction; shorter ones are taken for zero.

    The gradient of a direction grows with the inverse of the length. In float16 it has to fit in below 65,504, with
    room for the weight of a loss.
    """
    return 2.0**-10 if dtype == torch.float16 else 1e-12


def unit_vectors(rows: Tensor, smallest: float = 1e-12) -> Tensor:
    """Return the rows of (..., C) at unit length; up to the `smallest` length they are zero and have no gradient."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    known = length > smallest
    return torch.where(known, rows / torch.where(known, length, 1.0), 0.0)


def full_precision(tensor: Tensor) -> torch.autocast:
    """Return a context without autocast: similarities are ill-conditioned, half precision would lose them."""
    return torch.autocast(tensor.device.type, enabled=False)
