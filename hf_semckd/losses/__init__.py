"""Feature losses, usable in a trainer or in a plain PyTorch loop."""

from .base import FeatureLoss, FeatureLossOutput
from .combined import CombinedLoss
from .registry import FEATURE_LOSSES
from .semckd.loss import SemCKDLoss

__all__ = ["FEATURE_LOSSES", "CombinedLoss", "FeatureLoss", "FeatureLossOutput", "SemCKDLoss"]
