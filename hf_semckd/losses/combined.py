"""Several feature losses at once, such as SemCKD with a loss on embeddings."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigurationError
from ..features.targets import Features, LayerMasks, TeacherTargets
from .base import FeatureLoss, FeatureLossOutput


class CombinedLoss(FeatureLoss):
    """A weighted sum of feature losses on the same layers.

    total = loss_0 + sum over k of (w_k / w_0) * loss_k with each loss's own `default_weight` w: `feature_weight`
    scales the sum as it would scale the first loss alone. The association shown is that of the first loss with one.
    Raises `ConfigurationError` for fewer than two losses, or when one replaces the student's classifier.

    Source: Wang et al. (TKDE 2023) join SemCKD with CRD in this way.
    """

    def __init__(self, losses: Sequence[FeatureLoss]):
        super().__init__()
        if len(losses) < 2 or any(loss.reuses_teacher_head for loss in losses):
            raise ConfigurationError(
                "These feature losses cannot be joined",
                received=", ".join(type(loss).__name__ for loss in losses) or "nothing",
                expected="two or more, none of which replaces the student's classifier",
                todo="use one of them alone, with one teacher",
            )
        self.losses = nn.ModuleList(losses)
        # All are of the same layers; some take any.
        built = next((loss for loss in losses if loss.student_specs), losses[0])
        self.student_specs, self.teacher_specs = built.student_specs, built.teacher_specs
        self.title = " + ".join(loss.title for loss in losses)
        self.kept = repr([loss.kept for loss in losses])
        self.samples_tokens = any(loss.samples_tokens for loss in losses)
        self.default_weight = losses[0].default_weight
        self.shares = [loss.default_weight / losses[0].default_weight for loss in losses]
        self.required_batch_size = next((x.required_batch_size for x in losses if x.required_batch_size), None)
        self.upper_bound = next((loss.upper_bound for loss in losses if loss.upper_bound is not None), None)

    def compare(
        self, student_features: Features, targets: TeacherTargets, student_mask: LayerMasks
    ) -> FeatureLossOutput:
        """Return the weighted sum of all losses."""
        outputs = []
        for loss, part in zip(self.members, targets.parts, strict=True):
            loss.automatic_synchronization, loss.collecting = self.automatic_synchronization, self.collecting
            outputs.append(loss(student_features, part, student_mask))
        per_sample = self.shares[0] * outputs[0].per_sample
        for share, out in zip(self.shares[1:], outputs[1:], strict=True):
            per_sample = per_sample + share * out.per_sample
        return FeatureLossOutput(per_sample.mean(), per_sample, *self._shown(outputs))

    def _shown(self, outputs: Sequence[FeatureLossOutput]) -> tuple[Tensor | None, Tensor | None]:
        """Return the association and the errors that stand for all losses."""
        shown = next((out for out in outputs if out.association is not None), outputs[0])
        return shown.association, shown.errors

    @property
    def settings(self) -> dict[str, Any]:
        """Values in use of the fields whose defaults depend on the models, of all losses."""
        return {name: value for loss in self.members for name, value in loss.settings.items()}

    @property
    def needs_statistics(self) -> bool:
        """Whether one of the losses needs teacher statistics before the first batch."""
        return any(loss.needs_statistics for loss in self.members)

    def select(self, features: Features, mask: LayerMasks = None, phase: Tensor | None = None) -> TeacherTargets:
        """Return what each loss needs, in `parts`."""
        return TeacherTargets(parts=tuple(loss.select(features, mask, phase) for loss in self.members))

    def update_statistics(self, teacher_features: Features | TeacherTargets, teacher_mask: LayerMasks = None) -> None:
        """Let every loss collect teacher statistics."""
        for loss, part in zip(self.members, self.targets(teacher_features, teacher_mask).parts, strict=True):
            loss.update_statistics(part)

    def forget_collected(self) -> None:
        """Let every loss forget what it collected."""
        for loss in self.members:
            loss.forget_collected()

    def synchronize(
        self, reduce_sum: Callable[[Tensor], Tensor] | None = None, *, rank: int = 0, world: int = 1
    ) -> None:
        """Let every loss merge what it collected."""
        for loss in self.members:
            loss.synchronize(reduce_sum, rank=rank, world=world)

    @property
    def members(self) -> list[FeatureLoss]:
        """The joined losses."""
        return [loss for loss in self.losses if isinstance(loss, FeatureLoss)]
