"""The kind and size of a layer's output: a map or tokens, and the grid of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from ..errors import InputError
from .trace import ForwardTrace

# In order of preference: Swin returns maps beside the tokens, encoder-decoders two sequences.
HIDDEN_STATE_FIELDS = ("reshaped_hidden_states", "hidden_states", "decoder_hidden_states")
# Stages of a hierarchical model merge so many patches in each direction.
REDUCTIONS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class FeatureSpec:
    """The kind and size of one layer's output, without the batch dimension.

    Attributes:
        kind: `map` for (B, C, H, W), `tokens` for (B, N, C).
        length: Number of positions: N, or H * W, as seen when it was described; sequences may vary.
        grid: (H, W) of a map, or of the image patches among the tokens; None for text.
        prefix: Number of tokens in front of the patches (CLS, distillation and register tokens).
        side: The part of an encoder-decoder that the layer belongs to, where those of both are compared.
    """

    name: str
    kind: Literal["map", "tokens"]
    channels: int
    length: int
    grid: tuple[int, int] | None = None
    prefix: int = 0
    side: str = ""

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
    """Return the hidden states in a model's output, or None; maps (B, C, H, W) where a model gives both."""
    read = outputs.get if isinstance(outputs, Mapping) else partial(getattr, outputs)
    given = {field: read(field, None) for field in HIDDEN_STATE_FIELDS}
    maps, tokens = given["reshaped_hidden_states"], given["hidden_states"]
    if maps is not None and tokens is not None:
        # Hiera's maps have their channels last.
        last = all(grid.shape[-1] == x.shape[-1] for grid, x in zip(maps, tokens, strict=True))
        first = all(grid.shape[1] == x.shape[-1] for grid, x in zip(maps, tokens, strict=True))
        return tuple(grid.permute(0, 3, 1, 2) if last and not first else grid for grid in maps)
    states = next((value for value in given.values() if value is not None), None)
    # Some models (BridgeTower) give a tuple of states for each of their parts.
    if states is None or not all(isinstance(state, Tensor) for state in states):
        return None
    return tuple(states)


def without_hidden_states(outputs: Any) -> Any:
    """Return a copy of a model's output without the hidden states that only the capture needs."""
    if not isinstance(outputs, Mapping):
        return outputs
    dropped = (*HIDDEN_STATE_FIELDS, "encoder_hidden_states")
    return type(outputs)(**{key: value for key, value in outputs.items() if key not in dropped})


def describe(feature: Tensor, name: str, trace: ForwardTrace, *, of_image: bool) -> FeatureSpec:
    """Return the specification of a captured output (B, C, H, W), (B, N, C) or (B, C).

    The `trace` of its forward pass tells the grid of patches among tokens, and their prefix, where the tokens can be
    those of an image (`of_image`), and not of a text.
    """
    if feature.dim() == 2:
        return FeatureSpec(name, "tokens", feature.shape[1], 1)
    spec = FeatureSpec.from_shape(tuple(feature.shape[1:]), name)
    if spec.kind == "map" or not of_image:
        return spec
    grid, prefix = _patch_grid(trace, spec.length)
    return replace(spec, grid=grid, prefix=prefix)


def _patch_grid(trace: ForwardTrace, length: int) -> tuple[tuple[int, int] | None, int]:
    """Return the grid of the patches among so many tokens, None for none, and how many tokens are in front of them."""
    if length in trace.patches:
        start, stop = trace.patches[length]
        for reduction in REDUCTIONS:
            for height, width in trace.grids:
                grid = -(-height // reduction), -(-width // reduction)
                if grid[0] * grid[1] == stop - start:
                    return grid, start
        return None, 0
    # A single sample does not tell the model's own tokens from patches: most models put theirs in front.
    grids = [grid for grid in trace.grids if 1 < grid[0] * grid[1] <= length]
    return (grids[-1], length - grids[-1][0] * grids[-1][1]) if grids else (None, 0)
