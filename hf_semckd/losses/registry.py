"""The feature losses by name, and how a trainer makes one."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from ..errors import ConfigurationError
from ..features.layers import FeatureSpec
from .attention import ATLoss, MiniLMLoss
from .base import FeatureLoss, LossOptions
from .combined import CombinedLoss
from .regression import FitNetLoss, LayerMapLoss, PKDLoss, SimKDLoss, VIDLoss
from .relations import CCLoss, CRDLoss, PKTLoss, RKDLoss, SPLoss
from .semckd.loss import SemCKDLoss

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

# A name, several joined by "+", a loss that was made for the layers at hand, or a class that can be made for them.
LossSource = str | FeatureLoss | type[FeatureLoss]


def is_known(name: str) -> bool:
    """Whether a name is that of a feature loss, or of several joined by "+"."""
    return all(part in FEATURE_LOSSES for part in name.split("+"))


def make_feature_loss(
    source: str | type[FeatureLoss],
    student_specs: Sequence[FeatureSpec],
    teacher_specs: Sequence[FeatureSpec],
    options: LossOptions,
    **known: Any,
) -> FeatureLoss:
    """Return the feature loss of a name, of several joined by "+", or of a class, for the layers that were found.

    The other arguments are those of `FeatureLoss.for_layers`. Raises `ConfigurationError` for a method that cannot be
    used for these layers, or with another one.
    """
    losses = [method.for_layers(student_specs, teacher_specs, options, **known) for method in _methods(source)]
    return losses[0] if len(losses) == 1 else CombinedLoss(losses)


def names_layers(source: LossSource) -> bool:
    """Whether a method, or one of several joined by "+", compares modules of its own choice and not blocks."""
    plain: Any = FeatureLoss.find_layers
    return any(method.find_layers.__func__ is not plain.__func__ for method in _methods(source))


def reuses_teacher_head(source: LossSource | None) -> bool:
    """Whether a method, however it is given, ends the student with the teacher's classifier."""
    return source is not None and any(method.reuses_teacher_head for method in _methods(source))


def compares_both_sides(source: LossSource | None) -> bool:
    """Whether a method, and every one of several joined by "+", compares the encoder of a model with a decoder too."""
    return source is not None and all(method.compares_both_sides for method in _methods(source))


def find_layers(source: LossSource, model: nn.Module, role: str) -> list[str] | None:
    """Return the modules that a feature loss compares where the user chose no layers; None for all blocks.

    Raises `ConfigurationError` when the model lacks them, or joined methods want different ones.
    """
    found = [method.find_layers(model, role) for method in _methods(source)]
    if all(layers == found[0] for layers in found):
        return found[0]
    raise ConfigurationError(
        "The joined methods compare different layers",
        received=source,
        expected="methods that compare the same layers of a model",
        todo="use one of them alone",
    )


def _methods(source: LossSource) -> list[Any]:
    return [FEATURE_LOSSES[part] for part in source.split("+")] if isinstance(source, str) else [source]
