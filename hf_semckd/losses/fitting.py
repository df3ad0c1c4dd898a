"""Whether the features of a batch fit the layers that a loss was built for; said before anything is computed."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..features.layers import FeatureSpec
from ..features.targets import Features, LayerMasks, TeacherTargets


def check_features(features: Features, specs: Sequence[FeatureSpec], role: str) -> None:
    """Refuse, with an `InputError`, features of a student or teacher (`role`) that are not those of its layers.

    They are floating-point tensors of one batch, none of them empty: (B, C, H, W) of a map, (B, N, C) of tokens, or
    (B, C) of a layer with one, with the layer's channels. Only rank and type are known of a loss without `specs`.
    """
    for index, feature in enumerate(features):
        spec = specs[index] if specs else None
        if isinstance(feature, Tensor) and feature.is_floating_point() and _has_shape(feature, spec):
            if len(feature) == len(features[0]) and feature.numel():
                continue
        name = f"{role} {index}" if spec is None else spec.name
        raise InputError(
            f"The features of layer `{name}` do not fit it",
            received=_described(feature),
            expected=f"a floating-point tensor {_expected(spec)} of at least one sample, as many as the others",
            todo=f"pass the {role}'s layers as they were when the loss was built, in the same order",
        )


def check_masks(masks: LayerMasks, role: str) -> None:
    """Refuse, with an `InputError`, what is no mask (B, N), and no sequence of masks."""
    entries: Iterable[Any] = [masks] if masks is None or isinstance(masks, Tensor) else masks
    for mask in entries:
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise InputError(
                f"The {role}'s mask is not one of tokens",
                received=_described(mask),
                expected="a tensor (B, N), 0 for padding; one for each layer where their tokens differ; or None",
                todo="pass the attention_mask of the batch",
            )


def check_same_samples(student: Features, targets: TeacherTargets) -> None:
    """Refuse, with an `InputError`, a student and a teacher with different numbers of samples."""
    kept = next((len(value) for _, value, _ in targets.values()), None)
    if kept is not None and len(student) and kept != len(student[0]):
        raise InputError(
            "Student and teacher have different numbers of samples",
            received=f"{len(student[0])} of the student, {kept} of the teacher",
            expected="the same samples, in the same order",
            todo="run both models on the same batch",
        )


def check_same_positions(features: Features) -> None:
    """Refuse, with an `InputError`, layers (B, N, C) that are compared with each other and differ in N."""
    found = sorted({feature.shape[1] for feature in features})
    if len(found) > 1:
        raise InputError(
            "Layers that are compared with each other have different numbers of positions",
            received=" and ".join(map(str, found)),
            expected="the same one, as when the loss was built",
            todo="pass both models' layers of the same inputs, or build the loss with tokens_aligned=False",
        )


def _has_shape(feature: Tensor, spec: FeatureSpec | None) -> bool:
    if spec is None:
        return feature.dim() in (2, 3, 4)
    if spec.kind == "map":
        return feature.dim() == 4 and feature.shape[1] == spec.channels
    return feature.dim() in ((2, 3) if _is_vector(spec) else (3,)) and feature.shape[-1] == spec.channels


def _is_vector(spec: FeatureSpec) -> bool:
    """Whether a layer may give one vector for a sample, without an axis of tokens."""
    return spec.length == 1 and spec.grid is None


def _expected(spec: FeatureSpec | None) -> str:
    if spec is None:
        return "(B, C, H, W), (B, N, C) or (B, C)"
    if spec.kind == "map":
        return f"(B, {spec.channels}, H, W)"
    return f"(B, N, {spec.channels})" + (f" or (B, {spec.channels})" if _is_vector(spec) else "")


def _described(value: Any) -> str:
    return f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
