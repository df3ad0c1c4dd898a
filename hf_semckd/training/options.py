"""From the configuration to the plain values that losses take."""

from ..config import SemCKDConfig
from ..losses.base import LossOptions


def loss_options(config: SemCKDConfig) -> LossOptions:
    """Return what a configuration says of the feature loss."""
    return LossOptions(
        association=config.association,
        association_temperature=config.association_temperature,
        association_bank=config.association_bank,
        target_norm=config.target_norm,
        projector=config.projector,
        projection_init=config.projection_init,
        relation_weight=config.relation_weight,
        max_tokens=config.max_tokens,
        max_grid=config.max_grid,
        batch_size=config.per_device_train_batch_size,
        # Without logits nothing else would teach the last layer, and chosen layers are meant.
        spares_last_layer=config.student_layers is None and config.distills_logits,
    )
