"""Knowledge distillation for the Hugging Face ecosystem: features of all teacher layers, no layer map needed."""

from .config import SemCKDConfig
from .training.trainer import DistillationTrainer, SemCKDTrainer
from .version import __version__

__all__ = ["DistillationTrainer", "SemCKDConfig", "SemCKDTrainer", "__version__"]
