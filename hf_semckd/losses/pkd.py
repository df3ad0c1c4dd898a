"""Patient knowledge distillation (Sun et al., EMNLP 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..features.geometry import fitting_mask
from ..features.layers import FeatureSpec
from ..features.precision import at_least_float32
from .base import Shapes
from .baseline import BaselineBatch, SkipMapLoss
from .positions import regress


class PKDLoss(SkipMapLoss):
    """The squared difference of the normalized first tokens (CLS) of student layers and teacher layers at their depth.

    total = mean over samples, pairs of layers and channels of (s / |s| - t / |t|)^2, where s is the first token of a
    student layer and t that of its teacher layer in `skip_map`. The last student layer does not take part: the logits
    already train it. This is the average of the published code, which the published weights belong to; the paper
    writes the sum over layers and channels. Where widths differ, which the paper does not have, a linear layer
    projects the student's token to the teacher's. Positions need not correspond: the first token stands for the whole.

    Raises `ConfigurationError` when there is only one student layer, or a compared layer has no first token: a map, or
    image patches alone.

    Source: Patient Knowledge Distillation for BERT Model Compression (Sun et al., 2019), section 3.2: the patient loss
        L_PT with the strategy PKD-Skip; 100 is one of the weights searched there.
    """

    default_weight = 100.0

    def __init__(self, student_shapes: Shapes, teacher_shapes: Shapes, *, tokens_aligned: bool = True):
        super().__init__(student_shapes, teacher_shapes, tokens_aligned=tokens_aligned)
        self.projection = nn.ModuleList(
            nn.Identity() if own == theirs else nn.Linear(own, theirs) for own, theirs in self.widths
        )

    def choose_pairs(self, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return all pairs but the last; raise `ConfigurationError` for none, or a layer without a first token."""
        if len(pairs) < 2:
            raise ConfigurationError(
                "Patient knowledge distillation has no layer to compare",
                received="one student layer",
                expected="at least two: the last does not take part",
                todo="name more layers in student_layers, or leave it out for all",
            )
        for s, t in pairs[:-1]:
            _check_first_token(self.student_specs[s], "student")
            _check_first_token(self.teacher_specs[t], "teacher")
        return pairs[:-1]

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the error of each sample (B), the mean over the pairs; zero for a sample without any token."""
        errors = []
        for (s, t), projection in zip(self.pairs, self.projection, strict=True):
            token, counts = first_token(batch.features[s], batch.student_mask(s))
            target, target_counts = first_token(batch.targets.whole(t), batch.teacher_mask(t))
            if isinstance(projection, nn.Linear):
                token = regress(projection, token)
            own, theirs = F.normalize(at_least_float32(token), dim=1), F.normalize(at_least_float32(target), dim=1)
            errors.append(torch.where(counts & target_counts, (own - theirs).square().mean(1), 0.0))
        return torch.stack(errors).mean(0)


def first_token(feature: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the first token (B, C) of each sample of (B, N, C) that counts, and whether there is one, (B).

    A feature (B, C) is the token itself. With padding on the left the first token is not at position 0.
    """
    mask = fitting_mask(mask, feature)
    if mask is None:
        counts = torch.ones(len(feature), dtype=torch.bool, device=feature.device)
        return (feature if feature.dim() == 2 else feature[:, 0]), counts
    places = (mask != 0).long().argmax(1)
    tokens = feature.take_along_dim(places[:, None, None], 1).squeeze(1)
    counts = (mask != 0).any(1)
    return tokens.masked_fill(~counts.unsqueeze(1), 0.0), counts


def _check_first_token(spec: FeatureSpec, role: str) -> None:
    if spec.kind == "tokens" and (spec.grid is None or spec.prefix > 0):
        return
    received = "a map" if spec.kind == "map" else "image patches without a token in front"
    raise ConfigurationError(
        "Patient knowledge distillation compares first tokens (CLS), and a layer has none",
        received=f"{received} at {role} layer `{spec.name}`",
        expected="layers (tokens, channels) whose first token stands for the whole",
        todo=f"name other layers in {role}_layers, or choose another method for these models",
    )
