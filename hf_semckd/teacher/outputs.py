"""What the teacher gave for one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import TeacherOutputError
from ..features.layers import FeatureSpec


@dataclass
class TeacherOutputs:
    """What the teacher gave for one batch.

    Attributes:
        logits: (B, ...), or None when they were not needed.
        features: T features, or what the feature loss kept of them; empty when they were not needed.
        mask: (B, N) mask of the teacher's tokens, or None.
    """

    logits: Tensor | None = None
    features: Any = field(default_factory=list)
    mask: Tensor | None = None

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor."""
        yield from (tensor for tensor in (self.logits, self.mask) if tensor is not None)
        if isinstance(self.features, Mapping):
            yield from self.features.values()
        else:
            yield from self.features


@dataclass(frozen=True)
class TeacherDescription:
    """What a small batch tells of a teacher.

    Attributes:
        logits: Shape of the logits, or None when they are not needed; without the batch (and without the tokens) for
            a teacher that is known from an earlier run alone.
        specs: The chosen layers; empty when features are not distilled.
        features: What they gave; empty for a teacher that is known from an earlier run alone.
    """

    logits: tuple[int, ...] | None
    specs: list[FeatureSpec]
    features: list[Tensor]


def check_finite(outputs: TeacherOutputs, layers: Sequence[str]) -> None:
    """Refuse NaN and infinite teacher outputs, naming the layer and the sample.

    Args:
        outputs: The outputs.
        layers: Names of the teacher's layers.

    Raises:
        TeacherOutputError: When there are any outside the padding.
    """
    if isinstance(outputs.features, Mapping):
        numbered = [(name.partition(".")[2], value) for name, value in outputs.features.items()]
        kept = [(int(layer), value) for layer, value in numbered if layer and value.is_floating_point()]
        named = [(f"layer {layers[layer]}", value) for layer, value in sorted(kept, key=lambda entry: entry[0])]
    else:
        named = [(f"layer {name}", value) for name, value in zip(layers, outputs.features, strict=False)]
    # The first broken layer is the cause, logits follow.
    for name, values in [*named, *([("logits", outputs.logits)] if outputs.logits is not None else [])]:
        bad = ~torch.isfinite(values)
        if outputs.mask is not None and values.dim() == 3 and values.shape[1] == outputs.mask.shape[1]:
            bad &= outputs.mask.bool().unsqueeze(-1)
        samples = bad.reshape(len(bad), -1).any(1).nonzero().flatten().tolist()
        if samples:
            raise TeacherOutputError(
                f"The teacher's {name} {'are' if name == 'logits' else 'is'} not finite",
                received=f"NaN or infinity in batch index {', '.join(map(str, samples))}",
                expected="finite values",
                todo="check the teacher's weights and these samples; train with bf16 instead of fp16, in "
                "which the teacher runs too, and load it in float32 or bfloat16 when it is in float16",
            )
