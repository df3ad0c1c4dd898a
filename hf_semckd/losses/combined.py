"""Several feature losses at once, such as SemCKD with a loss on embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigurationError
from .base import FeatureLoss, FeatureLossOutput


class CombinedLoss(FeatureLoss):
    """A weighted sum of feature losses on the same layers.

    total = loss_0 + sum over k of (w_k / w_0) * loss_k with each loss's own `default_weight` w: `feature_weight`
    scales the sum as it would scale the first loss alone. The association that is shown is that of the first one that
    has any.

    Args:
        losses: Two or more feature losses, made for the same layers.

    Raises:
        ConfigurationError: When there are fewer, or two of them may not be joined.

    Source: Wang et al. (TKDE 2023) join SemCKD with CRD in this way.
    """

    def __init__(self, losses: Sequence[FeatureLoss]):
        super().__init__()
        if len(losses) < 2 or any(loss.reuses_teacher_head for loss in losses):
            raise ConfigurationError(
                "These feature losses cannot be joined",
                received=", ".join(type(loss).__name__ for loss in losses) or "nothing",
                expected="two or more, none of which replaces the student's classifier",
                todo="use one of them alone",
            )
        self.losses = nn.ModuleList(losses)
        self.default_weight = losses[0].default_weight
        self.shares = [loss.default_weight / losses[0].default_weight for loss in losses]
        self.required_batch_size = next((x.required_batch_size for x in losses if x.required_batch_size), None)
        self.upper_bound = next((loss.upper_bound for loss in losses if loss.upper_bound is not None), None)

    def forward(
        self,
        student_features: Sequence[Tensor],
        teacher_features: Sequence[Tensor] | Mapping[str, Tensor],
        student_mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> FeatureLossOutput:
        """Compare the features of a batch by every loss; see `FeatureLoss.forward`."""
        targets = self.select(teacher_features, teacher_mask)
        outputs = []
        for index, loss in enumerate(self._parts()):
            # The settings of a window are those of the whole.
            loss.automatic_synchronization, loss.collecting = self.automatic_synchronization, self.collecting
            outputs.append(loss(student_features, _part(targets, index), student_mask, teacher_mask))
        per_sample = sum(
            (share * out.per_sample for share, out in zip(self.shares[1:], outputs[1:], strict=True)),
            outputs[0].per_sample,
        )
        shown = next((out for out in outputs if out.attention is not None), outputs[0])
        return FeatureLossOutput(per_sample.mean(), per_sample, shown.attention, shown.errors)

    @property
    def title(self) -> str:
        """What the method is called on a model card."""
        return " + ".join(loss.title for loss in self._parts())

    @property
    def settings(self) -> dict[str, Any]:
        """What the losses use of the settings that depend on the models."""
        return {name: value for loss in self._parts() for name, value in loss.settings.items()}

    @property
    def needs_statistics(self) -> bool:
        """Whether one of the losses needs teacher statistics before the first batch."""
        return any(loss.needs_statistics for loss in self._parts())

    @property
    def samples_tokens(self) -> bool:
        """Whether one of the losses chooses among tokens."""
        return any(loss.samples_tokens for loss in self._parts())

    @property
    def kept(self) -> str:
        """What `select` keeps, in words."""
        return repr([loss.kept for loss in self._parts()])

    def select(
        self,
        teacher_features: Sequence[Tensor] | Mapping[str, Tensor],
        teacher_mask: Tensor | None = None,
        phase: Tensor | None = None,
    ) -> Mapping[str, Tensor]:
        """Keep what each loss needs, under names that begin with its number."""
        if isinstance(teacher_features, Mapping):
            return teacher_features
        kept: dict[str, Tensor] = {}
        for index, loss in enumerate(self._parts()):
            part = loss.select(teacher_features, teacher_mask, phase if loss.samples_tokens else None)
            if not isinstance(part, Mapping):
                part = {f"whole.{t}": feature for t, feature in enumerate(part)}
            kept |= {f"{index}/{name}": value for name, value in part.items()}
        return kept

    def update_statistics(
        self, teacher_features: Sequence[Tensor] | Mapping[str, Tensor], teacher_mask: Tensor | None = None
    ) -> None:
        """Let every loss collect teacher statistics."""
        targets = self.select(teacher_features, teacher_mask)
        for index, loss in enumerate(self._parts()):
            loss.update_statistics(_part(targets, index), teacher_mask)

    def synchronize(self, reduce_sum: Callable[[Tensor], Tensor] | None = None) -> None:
        """Let every loss take in what it observed."""
        for loss in self._parts():
            loss.synchronize(reduce_sum)

    def _parts(self) -> list[FeatureLoss]:
        return [loss for loss in self.losses if isinstance(loss, FeatureLoss)]


def _part(targets: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """Return what `select` kept for one loss, under the names that it gave."""
    prefix = f"{index}/"
    return {name.removeprefix(prefix): value for name, value in targets.items() if name.startswith(prefix)}
