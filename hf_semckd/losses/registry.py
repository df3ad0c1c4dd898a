"""The feature losses by name, and how a trainer makes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import nn

from ..errors import ConfigurationError
from ..features.layers import FeatureSpec
from .at import ATLoss
from .base import FeatureLoss
from .cc import CCLoss
from .combined import CombinedLoss
from .crd import CRDLoss
from .fitnet import FitNetLoss
from .layer_map import LayerMapLoss
from .minilm import MiniLMLoss
from .options import LossOptions
from .pkd import PKDLoss
from .pkt import PKTLoss
from .rkd import RKDLoss
from .semckd.loss import SemCKDLoss
from .simkd import SimKDLoss
from .sp import SPLoss
from .vid import VIDLoss

FEATURE_LOSSES: Mapping[str, type[FeatureLoss]] = MappingProxyType(
    {
        "semckd": SemCKDLoss,
        "fitnet": FitNetLoss,
        "at": ATLoss,
        "sp": SPLoss,
        "vid": VIDLoss,
        "pkt": PKTLoss,
        "rkd": RKDLoss,
        "cc": CCLoss,
        "crd": CRDLoss,
        "simkd": SimKDLoss,
        "pkd": PKDLoss,
        "minilm": MiniLMLoss,
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
    options: LossOptions,
    *,
    tokens_aligned: bool = True,
    student_parameters: int | None = None,
) -> FeatureLoss:
    """Return the feature loss of a name, or of several joined by "+", for the layers that were found.

    Args:
        name: See `FEATURE_LOSSES`.
        student_specs: The student's layers.
        teacher_specs: The teacher's layers.
        options: What the user chose.
        tokens_aligned: Whether position n of both models stands for the same input.
        student_parameters: Number of the student's parameters.

    Raises:
        ConfigurationError: When a method cannot be used for these layers, or with another one.
    """
    losses = [
        FEATURE_LOSSES[part].for_layers(
            student_specs,
            teacher_specs,
            options,
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
        "The joined methods compare different layers",
        received=source,
        expected="methods that compare the same layers of a model",
        todo="use one of them alone",
    )
