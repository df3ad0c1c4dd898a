"""What a teacher gives for one batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from ..features.targets import TeacherTargets


@dataclass
class TeacherOutputs:
    """What the teacher gave for one batch.

    Attributes:
        logits: (B, ...), or None when they are not needed.
        features: What the feature loss keeps of the layers' outputs; empty when they are not needed.
        mask: (B, N) mask of the teacher's tokens, or None.
    """

    logits: Tensor | None = None
    features: TeacherTargets = field(default_factory=TeacherTargets)
    mask: Tensor | None = None

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor."""
        yield from (tensor for tensor in (self.logits, self.mask) if tensor is not None)
        yield from self.features.tensors()
