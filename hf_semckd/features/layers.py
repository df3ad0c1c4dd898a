"""The kind and size of a layer's output: a map or tokens, and the grid of its tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import InputError

# In order of preference: Swin returns maps beside the tokens, encoder-decoders two sequences.
HIDDEN_STATE_FIELDS = ("reshaped_hidden_states", "hidden_states", "decoder_hidden_states")


@dataclass(frozen=True)
class FeatureSpec:
    """The kind and size of one layer's output, without the batch dimension.

    Attributes:
        kind: `map` for (B, C, H, W), `tokens` for (B, N, C).
        length: Number of positions: N, or H * W, as seen when it was described; sequences may vary.
        grid: (H, W) of a map, or of the image patches among the tokens; None for text.
        prefix: Number of tokens in front of the patches (CLS, distillation and register tokens).
    """

    name: str
    kind: Literal["map", "tokens"]
    channels: int
    length: int
    grid: tuple[int, int] | None = None
    prefix: int = 0

    @classmethod
    def from_shape(cls, shape: Sequence[int], name: str) -> FeatureSpec:
        """Describe a layer from a shape without the batch dimension: (C, H, W) is a map, (N, C) are tokens."""
        if len(shape) == 3:
            channels, height, width = shape
            return cls(name, "map", channels, height * width, (height, width))
        if len(shape) == 2:
            return cls(name, "tokens", shape[1], shape[0])
        raise InputError(
            f"The output of layer `{name}` is neither a map nor a sequence",
            received=f"shape {tuple(shape)} without the batch dimension",
            expected="(channels, height, width) or (tokens, channels)",
            todo="choose other layers with student_layers / teacher_layers",
        )


def hidden_states(outputs: Any) -> tuple[Tensor, ...] | None:
    """Return the hidden states in a model's output, or None; maps are preferred where a model gives both."""
    for field in HIDDEN_STATE_FIELDS:
        states = outputs.get(field) if isinstance(outputs, Mapping) else getattr(outputs, field, None)
        if states is not None:
            return tuple(states)
    return None


def without_hidden_states(outputs: Any) -> Any:
    """Return a copy of a model's output without the hidden states that only the capture needs."""
    if not isinstance(outputs, Mapping):
        return outputs
    dropped = (*HIDDEN_STATE_FIELDS, "encoder_hidden_states")
    return type(outputs)(**{key: value for key, value in outputs.items() if key not in dropped})


def describe(feature: Tensor, name: str, model: nn.Module, inputs: Mapping[str, Any]) -> FeatureSpec:
    """Return the specification of a captured output; for image tokens (a 4-D input), with their grid and prefix."""
    if feature.dim() == 2:
        return FeatureSpec(name, "tokens", feature.shape[1], 1)
    spec = FeatureSpec.from_shape(tuple(feature.shape[1:]), name)
    images = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim() == 4]
    if spec.kind == "map" or not images:
        return spec
    grid = _patch_grid(getattr(model, "config", None), (images[0].shape[-2], images[0].shape[-1]), spec.length)
    if grid is None:
        return spec
    return FeatureSpec(name, "tokens", spec.channels, spec.length, grid, spec.length - grid[0] * grid[1])


def first_block(states: tuple[Tensor, ...], config: Any) -> int:
    """Return 1 when the first hidden state is an embedding or a stem, 0 when it is a block already."""
    if len(states) == 1:
        return 0
    if states[0].dim() != 4:
        return 1
    stages = getattr(config, "depths", None)
    return 1 if stages is not None and len(states) == len(stages) + 1 else 0


def _patch_grid(config: Any, image: tuple[int, int], length: int) -> tuple[int, int] | None:
    for owner in (config, getattr(config, "vision_config", None)):
        patch = getattr(owner, "patch_size", None)
        if isinstance(patch, int):
            patch = (patch, patch)
        if isinstance(patch, (tuple, list)) and len(patch) == 2:
            grid = (image[0] // patch[0], image[1] // patch[1])
            if 0 < grid[0] * grid[1] <= length:
                return grid
    for prefix in (0, 1):
        side = math.isqrt(max(length - prefix, 0))
        if side > 0 and side * side == length - prefix:
            return (side, side)
    return None
