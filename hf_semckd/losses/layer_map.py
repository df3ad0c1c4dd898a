"""The uniform layer map that practitioners make by hand: each student layer regresses one teacher layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..functional import squared_error
from .base import layer_specs
from .baseline import BaselineLoss, Shape
from .fitnet import regress
from .positions import skip_map


class LayerMapLoss(BaselineLoss):
    """Every student layer, projected linearly, is to hit the teacher layer at its depth: their mean squared error.

    per_sample[i] = mean over student layers s, positions n that count and teacher channels c of
    (W_s F_s[i, n] + b_s - F_t(s)[i, n])[c]^2, where t(s) is `positions.skip_map`: the last to the last, evenly below.

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
        equation 8 (hidden states) with the uniform layer mapping; the weight of a layer is 1 there.
    """

    default_weight: ClassVar[float] = 1.0

    def __init__(
        self, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape], *, tokens_aligned: bool = True
    ):
        students, teachers = layer_specs(student_shapes, "student"), layer_specs(teacher_shapes, "teacher")
        pairing = skip_map(len(students), len(teachers))
        super().__init__(students, teachers, tokens_aligned=tokens_aligned, used_teacher_layers=pairing)
        self.teacher_of = pairing
        self.projection = nn.ModuleList(
            nn.Linear(spec.channels, teachers[t].channels) for spec, t in zip(students, pairing, strict=True)
        )

    def per_sample(
        self, student_features: Sequence[Tensor], targets: Mapping[str, Tensor], student_mask: Tensor | None
    ) -> Tensor:
        """Return the mean over student layers of each sample's error (B); see `BaselineLoss.per_sample`."""
        errors = []
        for s, (t, projection) in enumerate(zip(self.teacher_of, self.projection, strict=True)):
            student, target, mask = self.positions(student_features, targets, s, t, student_mask)
            errors.append(squared_error(regress(projection, student, mask), target, mask))
        return torch.stack(errors).mean(0)
