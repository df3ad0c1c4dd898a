"""Feature losses, usable in a trainer or in a plain PyTorch loop."""

from .base import FeatureLoss, FeatureLossOutput
from .semckd import SemCKDLoss

__all__ = ["FeatureLoss", "FeatureLossOutput", "SemCKDLoss"]
