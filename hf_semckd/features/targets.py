"""What a loss keeps of a teacher's features: one entry per layer, from the teacher's forward pass to the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from torch import Tensor

# The outputs of the layers of one model.
Features = Sequence[Tensor]
# One mask (B, N) for the tokens of all layers, or one for each layer; None where all positions count.
LayerMasks = Tensor | Sequence[Tensor | None] | None


def layer_mask(masks: LayerMasks, index: int) -> Tensor | None:
    """Return the mask of one layer: its own, or the one that all share."""
    return masks if masks is None or isinstance(masks, Tensor) else masks[index]


@dataclass(frozen=True, eq=False)
class TokenChoice:
    """Which tokens are kept of the layers of one layout; these layers share the object.

    `positions` (B, K) are those of the kept tokens, these first, None for all; `mask` (B, K) is nonzero for the places
    that hold a token, None where all do. They were chosen of `length` tokens with padding; None where that is unknown.
    """

    positions: Tensor | None = None
    mask: Tensor | None = None
    length: int | None = None


@dataclass(frozen=True, eq=False)
class LayerTarget:
    """What is kept of one teacher layer; None for every kind that the loss does not need.

    Attributes:
        whole: The layer's output, (B, C, H, W), (B, N, C) or (B, C).
        tokens: (B, K, C) the tokens that are compared.
        choice: Which tokens these are; None where all are kept and count.
        grid: (B, C, h, w) the map that is compared, pooled.
        mean: (B, C) the average over tokens or cells.
        embedding: (B, C) the vector that stands for a sample.
        summary: (B, D) the vector that similarities are computed from, where it is none of the above.
    """

    whole: Tensor | None = None
    tokens: Tensor | None = None
    choice: TokenChoice | None = None
    grid: Tensor | None = None
    mean: Tensor | None = None
    embedding: Tensor | None = None
    summary: Tensor | None = None


# The fields of a layer that hold a tensor of their own.
LAYER_TENSORS = tuple(entry.name for entry in fields(LayerTarget) if entry.name != "choice")


@dataclass(frozen=True, eq=False)
class TeacherTargets:
    """What a loss keeps of a batch's teacher features: one entry per layer, or `parts`, those of each joined loss.

    `mask` is that of the teacher's tokens, where whole features need it.
    """

    layers: tuple[LayerTarget, ...] = ()
    mask: LayerMasks = None
    parts: tuple[TeacherTargets, ...] = ()

    @classmethod
    def of_whole(
        cls, features: Features, mask: LayerMasks = None, used: Sequence[int] | None = None
    ) -> TeacherTargets:
        """Keep T features, or the `used` ones of them, as they are, detached, and the mask of their tokens."""
        kept = range(len(features)) if used is None else used
        wholes = (feature.detach() if t in kept else None for t, feature in enumerate(features))
        return cls(tuple(map(LayerTarget, wholes)), mask)

    def whole(self, t: int) -> Tensor:
        """Return the whole output of teacher layer t."""
        return required(self.layers[t].whole)

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor; what layers share comes with each of them."""
        for part in self.parts:
            yield from part.tensors()
        for layer in self.layers:
            choice = layer.choice or TokenChoice()
            held = (*(getattr(layer, name) for name in LAYER_TENSORS), choice.positions, choice.mask)
            yield from (tensor for tensor in held if tensor is not None)
        masks = [self.mask] if self.mask is None or isinstance(self.mask, Tensor) else self.mask
        yield from (mask for mask in masks if mask is not None)

    def values(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yield the layer, the values and, for tokens (B, K, C), the mask (B, K) of each kind of features kept."""
        for part in self.parts:
            yield from part.values()
        for t, layer in enumerate(self.layers):
            chosen = None if layer.choice is None else layer.choice.mask
            for name in LAYER_TENSORS:
                value, mask = getattr(layer, name), layer_mask(self.mask, t) if name == "whole" else chosen
                if value is not None:
                    yield t, value, mask if value.dim() == 3 else None


def required(value: Tensor | None) -> Tensor:
    """Return a kind of features that the loss keeps, and so finds in its targets."""
    assert value is not None
    return value
