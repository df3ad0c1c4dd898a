"""What a user chose for the feature loss, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from ..choices import Association, ProjectionInit, Projector, TargetNorm


@dataclass(frozen=True)
class LossOptions:
    """Choices for a feature loss; None where the layers at hand decide. A baseline reads none of them.

    Attributes:
        association, association_temperature, target_norm, projector, projection_init, relation_weight, max_tokens,
            max_grid: As in `SemCKDConfig`.
        batch_size: Samples in every training batch, which the published association is built for.
        spares_last_layer: Whether the student's last layer may be left to the logits, which teach it already.
    """

    association: Association | None = None
    association_temperature: float | None = None
    target_norm: TargetNorm = "channel"
    projector: Projector | None = None
    projection_init: ProjectionInit | None = None
    relation_weight: float | None = None
    max_tokens: int = 16
    max_grid: int | None = None
    batch_size: int | None = None
    spares_last_layer: bool = True

    @property
    def depends_on_batch_size(self) -> bool:
        """Whether the association networks take whole similarity rows, as published, and so fix the batch size."""
        return self.association == "learned" and self.target_norm == "none"
