from .config import SemCKDConfig as SemCKDConfig
from .training.trainer import DistillationTrainer as DistillationTrainer
from .training.trainer import SemCKDTrainer as SemCKDTrainer
from .version import __version__ as __version__

__all__ = ["DistillationTrainer", "SemCKDConfig", "SemCKDTrainer", "__version__"]
