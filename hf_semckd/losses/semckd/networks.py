"""The query and key networks of the learned associations."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import RaggedBatchError
from ...features.precision import full_precision

# Wide enough for every association that was measured, and small beside any student.
EMBEDDING_WIDTH = 32
# Logits of the learned association are cosines times a learned scale, held below this for stability.
MAXIMUM_SCALE = 100.0


class SimilarityEmbedding(nn.Sequential):
    """The published query or key network: Linear(B, 2d), ReLU, Linear(2d, d), then unit length; d = B / 4."""

    def __init__(self, batch_size: int):
        width = max(batch_size // 4, 1)
        super().__init__(nn.Linear(batch_size, 2 * width), nn.ReLU(inplace=True), nn.Linear(2 * width, width))
        self.batch_size = batch_size

    def forward(self, similarity: Tensor) -> Tensor:
        """Embed each row of a (B, B) similarity matrix into (B, d); `RaggedBatchError` for another B."""
        if len(similarity) != self.batch_size:
            raise RaggedBatchError(
                "The published association takes similarity rows, whose length is the batch size",
                received=f"a batch of {len(similarity)}",
                expected=f"{self.batch_size} samples in every batch",
                todo="set dataloader_drop_last=True, pad the dataset to a multiple of the batch size, or use "
                "target_norm='channel', whose associations take any batch size",
            )
        # Raw similarities overflow float16, to which autocast would lower them.
        with full_precision(similarity):
            return F.normalize(super().forward(similarity.to(next(self.parameters()).dtype)), dim=1)


class FeatureEmbedding(nn.Sequential):
    """The query or key network on a sample's own mean feature: LayerNorm, Linear, ReLU, Linear, then unit length."""

    def __init__(self, channels: int):
        width = EMBEDDING_WIDTH
        super().__init__(
            nn.LayerNorm(channels, elementwise_affine=False),
            nn.Linear(channels, 2 * width),
            nn.ReLU(inplace=True),
            nn.Linear(2 * width, width),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Embed (B, C) into (B, d)."""
        return F.normalize(super().forward(features.to(next(self.parameters()).dtype)), dim=1)


class LearnedScale(nn.Module):
    """A learned positive factor, 1 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        """Return the factor, a scalar of at most `MAXIMUM_SCALE`."""
        return self.log.clamp(max=math.log(MAXIMUM_SCALE)).exp()
