"""The uniform layer map: each student layer regresses the teacher layer at its depth."""

import torch
from torch import Tensor, nn

from .base import Shapes
from .baseline import BaselineBatch, SkipMapLoss
from .positions import regress
from .reduction import squared_error


class LayerMapLoss(SkipMapLoss):
    """The mean squared error of every student layer, linearly projected, against the teacher layer at its depth.

    per_sample[i] = mean over student layers s, positions n that count and teacher channels c of
    (W_s F_s[i, n] + b_s - F_t(s)[i, n])[c]^2, where t(s) is `skip_map`.

    TinyBERT shares one projection among all layers; here each has its own, as layers may differ in width. The mean
    over student layers instead of the paper's sum keeps the size of the loss independent of the student's depth.

    Source: Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", Findings of EMNLP 2020,
        the loss of the hidden states, with the uniform layer mapping; the weight of a layer is 1 there.
    """

    default_weight = 1.0

    def __init__(self, student_shapes: Shapes, teacher_shapes: Shapes, *, tokens_aligned: bool = True):
        super().__init__(student_shapes, teacher_shapes, tokens_aligned=tokens_aligned)
        self.projection = nn.ModuleList(nn.Linear(*widths) for widths in self.widths)

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the mean over student layers of each sample's error (B)."""
        errors = []
        for s, (t, projection) in enumerate(zip(self.teacher_of, self.projection, strict=True)):
            student, target, mask = batch.pair(s, t)
            errors.append(squared_error(regress(projection, student, mask), target, mask))
        return torch.stack(errors).mean(0)
