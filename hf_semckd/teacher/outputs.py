"""What the teacher gives for one batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import torch
from torch import Tensor

from ..errors import TeacherOutputError
from ..features.layers import FeatureSpec
from ..features.targets import TeacherTargets
from ..losses.sampled_logits import SampledLogits


@dataclass
class TeacherOutputs:
    """What the teacher gave for one batch.

    Attributes:
        logits: (B, ...), or None when they are not needed.
        hidden: (B, N, D) what a causal language model's head makes logits of, in place of these; or None.
        features: What the feature loss keeps of the layers' outputs; empty when they are not needed.
        mask: (B, N) mask of the teacher's tokens.
        sampled: What a cache kept in place of the logits; or None.
    """

    logits: Tensor | None = None
    features: TeacherTargets = field(default_factory=TeacherTargets)
    mask: Tensor | None = None
    hidden: Tensor | None = None
    sampled: SampledLogits | None = None

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor."""
        yield from (tensor for tensor in (self.logits, self.mask, self.hidden) if tensor is not None)
        yield from () if self.sampled is None else (self.sampled.ids, self.sampled.entropy)
        yield from self.features.tensors()


@dataclass(frozen=True)
class TeacherDescription:
    """What a small batch tells of a teacher.

    Attributes:
        logits: Shape of the logits, or None when they are not needed; see `noted`.
        specs: The chosen layers; empty when features are not distilled.
        features: What they gave.
        noted: Whether a note beside the cache told it: the logits lack batch and tokens, and there are no features.
    """

    logits: tuple[int, ...] | None
    specs: list[FeatureSpec]
    features: list[Tensor]
    noted: bool = False

    @property
    def logits_of_a_position(self) -> tuple[int, ...] | None:
        """Shape of the logits without the batch, and without the tokens where there are some."""
        if self.logits is None or self.noted:
            return self.logits
        return self.logits[-1:] if len(self.logits) == 3 else self.logits[1:]


def check_finite(
    outputs: TeacherOutputs, layers: Sequence[str], prefix: str = "", samples: Sequence[int] | None = None
) -> None:
    """Raise `TeacherOutputError`, naming layer and sample, for NaN and infinity outside the padding.

    `prefix` names the teacher where there are several; `samples` are those of the batch that it ran on, None for all.
    """
    # The first broken layer is the cause, logits follow.
    found = sorted(outputs.features.values(), key=itemgetter(0))
    named = [(f"layer {prefix}{layers[t]} is", values, mask) for t, values, mask in found]
    if outputs.logits is not None:
        named.append((f"{prefix}logits are", outputs.logits, outputs.mask))
    for name, values, mask in named:
        bad = ~torch.isfinite(values)
        if mask is not None and values.dim() == 3 and values.shape[1] == mask.shape[1]:
            bad &= mask.bool().unsqueeze(-1)
        places = bad.reshape(len(bad), -1).any(1).nonzero().flatten().tolist()
        if places:
            numbers = [place if samples is None else samples[place] for place in places]
            raise TeacherOutputError(
                f"The teacher's {name} not finite",
                received=f"NaN or infinity in batch index {', '.join(map(str, numbers))}",
                expected="finite values",
                todo="check the teacher's weights and these samples; train with bf16 instead of fp16, in "
                "which the teacher runs too, and load it in float32 or bfloat16 when it is in float16",
            )
