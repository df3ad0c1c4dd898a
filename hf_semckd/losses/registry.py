"""The feature losses by name, and how a trainer makes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import nn

from ..config import SemCKDConfig
from ..errors import ConfigurationError, message
from ..features import FeatureSpec
from .attention_transfer import AttentionTransferLoss
from .base import FeatureLoss
from .cc import CorrelationCongruenceLoss
from .combined import CombinedLoss
from .crd import ContrastiveLoss
from .fitnet import FitNetLoss
from .layer_map import LayerMapLoss
from .minilm import AttentionRelationLoss
from .pkd import PatientKnowledgeLoss
from .pkt import ProbabilisticTransferLoss
from .rkd import RelationalLoss
from .semckd import SemCKDLoss
from .similarity_preserving import SimilarityPreservingLoss
from .simkd import ReusedClassifierLoss
from .vid import VariationalInformationLoss

FEATURE_LOSSES: Mapping[str, type[FeatureLoss]] = MappingProxyType(
    {
        "semckd": SemCKDLoss,
        "fitnet": FitNetLoss,
        "at": AttentionTransferLoss,
        "sp": SimilarityPreservingLoss,
        "vid": VariationalInformationLoss,
        "pkt": ProbabilisticTransferLoss,
        "rkd": RelationalLoss,
        "cc": CorrelationCongruenceLoss,
        "crd": ContrastiveLoss,
        "simkd": ReusedClassifierLoss,
        "pkd": PatientKnowledgeLoss,
        "minilm": AttentionRelationLoss,
        "layer_map": LayerMapLoss,
    }
)


def is_known(name: str) -> bool:
    """Whether a name is that of a feature loss, or of several joined by "+"."""
    return all(part in FEATURE_LOSSES for part in name.split("+"))


def make_feature_loss(
    name: str,
    student_specs: Sequence[FeatureSpec],
    teacher_specs: Sequence[FeatureSpec],
    config: SemCKDConfig,
    *,
    tokens_aligned: bool = True,
    student_parameters: int | None = None,
) -> FeatureLoss:
    """Return the feature loss of a name, or of several joined by "+", for the layers that were found.

    Args:
        name: See `FEATURE_LOSSES`.
        student_specs: The student's layers.
        teacher_specs: The teacher's layers.
        config: The configuration.
        tokens_aligned: Whether position n of both models stands for the same input.
        student_parameters: Number of the student's parameters.

    Raises:
        ConfigurationError: When a method cannot be used for these layers, or with another one.
    """
    losses = [
        FEATURE_LOSSES[part].from_config(
            student_specs,
            teacher_specs,
            config,
            tokens_aligned=tokens_aligned,
            student_parameters=student_parameters,
        )
        for part in name.split("+")
    ]
    return losses[0] if len(losses) == 1 else CombinedLoss(losses)


def names_layers(name: str) -> bool:
    """Whether a method, or one of several joined by "+", compares modules of its own choice and not blocks."""
    plain = FeatureLoss.find_layers.__func__  # type: ignore[attr-defined]
    return any(FEATURE_LOSSES[part].find_layers.__func__ is not plain for part in name.split("+"))  # type: ignore[attr-defined]


def reuses_teacher_head(source: str | FeatureLoss | None) -> bool:
    """Whether a method, given by name or as a loss, ends the student with the teacher's classifier."""
    if isinstance(source, str):
        return any(FEATURE_LOSSES[part].reuses_teacher_head for part in source.split("+"))
    return source is not None and source.reuses_teacher_head


def find_layers(source: str | FeatureLoss, model: nn.Module, role: str) -> list[str] | None:
    """Return the modules that a feature loss asks for where the user chose no layers; None for all blocks.

    Args:
        source: A name, or several joined by "+", or a loss.
        model: The student or the teacher.
        role: `student` or `teacher`, for messages.

    Raises:
        ConfigurationError: When the model lacks them, or joined methods want different ones.
    """
    if isinstance(source, FeatureLoss):
        return source.find_layers(model, role)
    found = [FEATURE_LOSSES[part].find_layers(model, role) for part in source.split("+")]
    if all(layers == found[0] for layers in found):
        return found[0]
    raise ConfigurationError(
        message(
            "The joined methods compare different layers",
            received=source,
            expected="methods that compare the same layers of a model",
            todo="use one of them alone",
        )
    )
