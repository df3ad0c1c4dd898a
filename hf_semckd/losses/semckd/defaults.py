"""SemCKD's defaults."""

from dataclasses import dataclass

from ...choices import Association, ProjectionInit, Projector
from ..base import LossOptions

# Learned weights tend to softmax(-error / temperature), and standardized errors lie between 0 and about 2: at 0.2
# nearly all would go to one layer, at 1 little is chosen.
DEFAULT_LEARNED_TEMPERATURE = 0.5
PUBLISHED_TEMPERATURE = 1.0


@dataclass(frozen=True)
class FeatureDefaults:
    """SemCKD's defaults between two kinds of layers, measured in `scripts/results/accuracy`; see `SemCKDConfig`.

    `similarity_temperature` is the `association_temperature` of weights by similarity, or by sinkhorn; the last
    `spared_layers` student layers are not compared.
    """

    feature_weight: float
    relation_weight: float
    association: Association
    projector: Projector
    projection_init: ProjectionInit
    max_grid: int
    similarity_temperature: float
    spared_layers: int


# Maps (measured with CNNs; Swin and SegFormer have maps too): early layers teach, after convolutions and at full
# size, and the more the better they fit. It harms the last layer, which logits already train; relations add nothing.
MAP_DEFAULTS = FeatureDefaults(100.0, 0.0, "sinkhorn", "convolutional", "random", 8, 0.02, 1)
# An image transformer on one side at least: relations teach, and how projections start makes no difference.
IMAGE_DEFAULTS = FeatureDefaults(3.0, 20.0, "similarity", "shared", "random", 4, 0.2, 0)
# Text, and everything else without a grid: random projections give the student random gradients until they have
# learned, and a short training does not make up for that.
SEQUENCE_DEFAULTS = FeatureDefaults(3.0, 0.0, "similarity", "shared", "zero", 4, 0.2, 0)


def feature_defaults(projector: Projector | None, *, maps: bool, images: bool) -> FeatureDefaults:
    """Return the defaults between layers that are `maps`, or lie on a grid as an image's patches do (`images`)."""
    # Through a linear projection, without a decoder, the weight of maps does harm.
    if maps and projector in (None, "convolutional"):
        return MAP_DEFAULTS
    return IMAGE_DEFAULTS if images else SEQUENCE_DEFAULTS


def association_temperature(options: LossOptions, defaults: FeatureDefaults = IMAGE_DEFAULTS) -> float:
    """Return the association temperature: the user's, or the default between the layers at hand."""
    if options.association_temperature is not None:
        return options.association_temperature
    if options.association != "learned":
        return defaults.similarity_temperature
    return PUBLISHED_TEMPERATURE if options.target_norm == "none" else DEFAULT_LEARNED_TEMPERATURE
