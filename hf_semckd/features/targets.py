"""What a loss keeps of a teacher's features: one entry a layer, from the teacher's forward to the loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenChoice:
    """Which tokens are kept of the layers of one layout.

    Attributes:
        positions: (B, K) places of the kept tokens in their sample, or None where all are kept.
        mask: (B, K) of ones for the places that hold a token, or None where all do.
    """

    positions: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class LayerTarget:
    """What is kept of one teacher layer; None where a loss needs nothing of the kind.

    Attributes:
        whole: The layer's output, (B, C, H, W), (B, N, C) or (B, C).
        tokens: (B, K, C) the tokens that are compared.
        choice: Which tokens these are; layers of one layout share the object.
        grid: (B, C, h, w) the map that is compared, pooled.
        mean: (B, C) the average over tokens or cells.
        embedding: (B, C) the vector that stands for a sample.
        summary: (B, D) what similarities between samples are taken on, where it is none of the above.
    """

    whole: Tensor | None = None
    tokens: Tensor | None = None
    choice: TokenChoice | None = None
    grid: Tensor | None = None
    mean: Tensor | None = None
    embedding: Tensor | None = None
    summary: Tensor | None = None


@dataclass(frozen=True)
class TeacherTargets:
    """What a loss keeps of a batch's teacher features.

    Attributes:
        layers: One entry for each teacher layer.
        mask: (B, N) the teacher's token mask, where whole features need it.
        parts: The targets of each of several joined losses; `layers` is empty then.
    """

    layers: tuple[LayerTarget, ...] = ()
    mask: Tensor | None = None
    parts: tuple[TeacherTargets, ...] = ()
