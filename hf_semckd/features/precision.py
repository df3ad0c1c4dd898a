"""Precision of intermediate results."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen half-precision tensors to float32 and leave wider ones (float64 included) as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def full_precision(tensor: Tensor) -> torch.autocast:
    """Return a context without autocast: similarities are ill-conditioned, half precision would lose them."""
    return torch.autocast(tensor.device.type, enabled=False)
