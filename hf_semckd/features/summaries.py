"""One vector per sample: averages, embeddings, and summaries to compute similarities from."""

from torch import Tensor

from .geometry import as_map, limited_grid
from .layers import FeatureSpec
from .precision import at_least_float32

# Larger maps are pooled to this before similarities: coarse positions matter, single pixels do not.
SUMMARY_GRID = 4


class Average:
    """Averages layers' outputs over their positions; terms of the mask alone are computed once.

    Positions whose mask (B, N) is 0 do not count in features of N positions, whatever they hold. None: all count.
    """

    def __init__(self, mask: Tensor | None = None):
        self.mask = mask
        self._parts: tuple[Tensor, Tensor] | None = None

    def __call__(self, feature: Tensor) -> Tensor:
        """Return the average (B, C) of (B, C, H, W), (B, N, C) or (B, C); under the mask at least in float32."""
        if feature.dim() == 4:
            return feature.mean((2, 3))
        if feature.dim() == 2:
            return feature
        if self.mask is None or self.mask.shape[1] != feature.shape[1]:
            return feature.mean(1)
        dtype = at_least_float32(feature[:0]).dtype
        if self._parts is None or self._parts[1].dtype != dtype:
            counted = self.mask != 0
            self._parts = ~counted.unsqueeze(-1), counted.sum(1, keepdim=True).clamp(min=1).to(dtype)
        left_out, count = self._parts
        # In half precision the sum of a long sequence overflows, though its mean would not.
        return feature.masked_fill(left_out, 0.0).sum(1, dtype=dtype) / count


def embedding(feature: Tensor, spec: FeatureSpec, average: Average) -> Tensor:
    """Return the vector (B, C) that a classifier would read of a layer: the first token (CLS), or else the average."""
    return feature[:, 0] if feature.dim() == 3 and spec.prefix > 0 else average(feature)


def summary(feature: Tensor, spec: FeatureSpec, average: Average) -> Tensor:
    """Return (B, C * cells) to compute similarities from: a small map for images, the mean token for text."""
    if spec.grid is None:
        return at_least_float32(average(feature))
    return at_least_float32(as_map(feature, spec, summary_size(feature, spec)).flatten(1))


def summary_size(feature: Tensor, spec: FeatureSpec) -> tuple[int, int]:
    """Return the height and width of the map in a summary."""
    return limited_grid(feature, spec, SUMMARY_GRID)
