"""The feature losses of a student with several teachers: one for each of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import FeatureLoss, FeatureLossOutput
from .combined import CombinedLoss


class EnsembleLoss(CombinedLoss):
    """The weighted mean of one feature loss per teacher, each with projections and an association of its own.

    total = sum over k of w_k * (d_k / d_0) * loss_k with the losses' `default_weight` d, which are the same unless
    teachers are of different kinds (a CNN and a ViT): `feature_weight` scales the sum as it would scale the first.
    The association (B, S, T) has the layers of the teachers side by side, those of teacher k multiplied by w_k: a
    student layer's weights sum to w_k over the layers of each teacher, and to 1 in all. It takes `TeacherTargets` with
    a part for each teacher.

    Args:
        losses: Two or more, none of which replaces the student's classifier; else `ConfigurationError`.
        weights: w, which sum to 1.
    """

    def __init__(self, losses: Sequence[FeatureLoss], weights: Sequence[float]):
        super().__init__(losses)
        self.weights = list(weights)
        self.title = losses[0].title
        self.student_specs = losses[0].student_specs
        self.teacher_specs = [spec for loss in losses for spec in loss.teacher_specs]
        self.shares = [weight * share for weight, share in zip(weights, self.shares, strict=True)]
        bounds = zip(weights, (loss.upper_bound for loss in losses), strict=True)
        self.upper_bound = max((weight * bound for weight, bound in bounds if bound is not None), default=None)

    @property
    def settings(self) -> dict[str, Any]:
        """Values in use of the fields whose defaults depend on the models; one per teacher where they differ."""
        found = [loss.settings for loss in self.members]
        values = {name: [settings.get(name) for settings in found] for name in found[0]}
        return {name: each[0] if each.count(each[0]) == len(each) else each for name, each in values.items()}

    def _shown(self, outputs: Sequence[FeatureLossOutput]) -> tuple[Tensor | None, Tensor | None]:
        shared = zip(self.weights, outputs, strict=True)
        weights = [w * out.association for w, out in shared if out.association is not None]
        errors = [out.errors for out in outputs if out.errors is not None]
        return torch.cat(weights, 2) if weights else None, torch.cat(errors, 2) if errors else None
