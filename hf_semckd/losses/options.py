"""The user's choices for the feature loss, as plain values."""

from dataclasses import dataclass

from ..choices import Association, ProjectionInit, Projector, TargetNorm


@dataclass(frozen=True)
class LossOptions:
    """Choices for a feature loss, as in `SemCKDConfig`; None where the layers decide. Baselines have none."""

    association: Association | None = None
    association_temperature: float | None = None
    target_norm: TargetNorm = "channel"
    projector: Projector | None = None
    projection_init: ProjectionInit | None = None
    relation_weight: float | None = None
    association_bank: int = 0
    max_tokens: int = 16
    max_grid: int | None = None
    # Samples in every training batch, which the published association is built for.
    batch_size: int | None = None
    # Whether the student's last layer may be left to the logits.
    spares_last_layer: bool = True
