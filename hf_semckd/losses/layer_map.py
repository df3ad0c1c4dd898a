"""The uniform layer map that practitioners make by hand: each student layer regresses one teacher layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..features.targets import TeacherTargets
from .base import Shape
from .baseline import SkipMapLoss
from .positions import regress
from .reduction import squared_error


class LayerMapLoss(SkipMapLoss):
    """Every student layer, projected linearly, is to hit the teacher layer at its depth: their mean squared error.

    per_sample[i] = mean over student layers s, positions n that count and teacher channels c of
    (W_s F_s[i, n] + b_s - F_t(s)[i, n])[c]^2, where t(s) is `calibration.skip_map`: last to last, evenly below.

    TinyBERT shares one projection among all layers; here each student layer has its own, as layers may differ in
    width. Maps and image tokens of different sizes are pooled to the smaller grid. The mean over student layers
    instead of the paper's sum keeps the size of the loss independent of the student's depth.

    Features are (B, C, H, W) or (B, N, C), the loss of each sample is (B).

    Args:
        student_shapes: One (C, H, W), (tokens, C) or `FeatureSpec` for each student layer.
        teacher_shapes: The same for each teacher layer.
        tokens_aligned: Whether position n of both models stands for the same input.

    Attributes:
        teacher_of: The teacher layer of each student layer.
        projection: One linear map for each student layer, from its channels to those of its teacher layer.

    Raises:
        InputError: When there is no layer, or a shape is neither a map nor tokens.

    Source: Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", Findings of EMNLP 2020,
        the loss of the hidden states, with the uniform layer mapping; the weight of a layer is 1 there.
    """

    default_weight: float = 1.0

    def __init__(
        self, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape], *, tokens_aligned: bool = True
    ):
        super().__init__(student_shapes, teacher_shapes, tokens_aligned=tokens_aligned)
        self.projection = nn.ModuleList(
            nn.Linear(spec.channels, self.teacher_specs[t].channels)
            for spec, t in zip(self.student_specs, self.teacher_of, strict=True)
        )

    def per_sample(
        self, student_features: Sequence[Tensor], targets: TeacherTargets, student_mask: Tensor | None
    ) -> Tensor:
        """Return the mean over student layers of each sample's error (B); see `BaselineLoss.per_sample`."""
        errors = []
        for s, (t, projection) in enumerate(zip(self.teacher_of, self.projection, strict=True)):
            student, target, mask = self.positions(student_features, targets, s, t, student_mask)
            errors.append(squared_error(regress(projection, student, mask), target, mask))
        return torch.stack(errors).mean(0)
