from .config import SemCKDConfig as SemCKDConfig
from .training.report import inspect_models as inspect_models
from .training.trainer import DistillationTrainer as DistillationTrainer
from .training.trainer import SemCKDTrainer as SemCKDTrainer
from .version import __version__ as __version__

__all__ = ["DistillationTrainer", "SemCKDConfig", "SemCKDTrainer", "__version__", "inspect_models"]
