from .config import SemCKDConfig as SemCKDConfig
from .evaluation.evaluate import evaluate as evaluate
from .evaluation.export import export_onnx as export_onnx
from .models.students import make_student as make_student
from .training.report import inspect_models as inspect_models
from .training.trainer import DistillationTrainer as DistillationTrainer
from .training.trainer import SemCKDTrainer as SemCKDTrainer
from .version import __version__ as __version__

__all__ = [
    "DistillationTrainer",
    "SemCKDConfig",
    "SemCKDTrainer",
    "__version__",
    "evaluate",
    "export_onnx",
    "inspect_models",
    "make_student",
]
