"""The projections of the student's layers, and the decoders before them."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ...choices import ProjectionInit
from ...features.geometry import Alignment
from ...features.layers import FeatureSpec


class FeatureDecoder(nn.Sequential):
    """Two convolutions on a student's map before its projection: 1x1 conv, BN, ReLU, 3x3 conv, BN, ReLU, no bias.

    Behind a decoder, the teacher's features need only be decodable from the student's, and not linear in them. These
    are the projections of SemCKD (Chen et al., 2021) without their last convolution.
    """

    def __init__(self, channels: int, width: int, kernel: int = 3):
        super().__init__(
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Return (B, C', H, W) of (B, C, H, W); a single position is normalized by the running statistics."""
        if not self.training or len(maps) * maps.shape[2] * maps.shape[3] != 1:
            return super().forward(maps)
        for layer in self:
            maps = _by_running_statistics(layer, maps) if isinstance(layer, nn.BatchNorm2d) else layer(maps)
        return maps


class ConvolutionalProjection(FeatureDecoder):
    """The published projection of a pair: 1x1 conv to 2 * C_t, BN, ReLU, 3x3 conv, BN, ReLU, 1x1 conv to C_t, no bias.

    See SemCKD, section 3.3. On tokens, which have no neighbors in two dimensions, the middle kernel is 1.
    """

    def __init__(self, student_channels: int, teacher_channels: int, kernel: int = 3):
        super().__init__(student_channels, 2 * teacher_channels, kernel)
        self.append(nn.Conv2d(2 * teacher_channels, teacher_channels, 1, bias=False))

    def project_tokens(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Project (B, N, C_s) token by token; masked tokens do not reach the batch statistics and come out as zero."""
        rows = tokens.flatten(0, 1) if mask is None else tokens[mask.bool()]
        projected = self(rows[:, :, None, None])[:, :, 0, 0]
        if mask is None:
            return projected.view(*tokens.shape[:2], -1)
        out = projected.new_zeros(*tokens.shape[:2], projected.shape[1])
        out[mask.bool()] = projected
        return out


def _by_running_statistics(norm: nn.BatchNorm2d, maps: Tensor) -> Tensor:
    return F.batch_norm(maps, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


# Channels inside a decoder. The published projections have twice the teacher's, at many times the price.
DECODER_WIDTH = 64
# Neighboring student layers share projections where these would weigh more than this share of the student.
MAXIMUM_PROJECTION_SHARE = 0.2


def layers_per_projection(
    student_specs: Sequence[FeatureSpec], teacher_specs: Sequence[FeatureSpec], student_parameters: int | None
) -> int:
    """Return how many neighboring student layers share projections, to keep them below `MAXIMUM_PROJECTION_SHARE`.

    Neighboring layers of a transformer write into one residual stream, so that one basis serves them. All share where
    no smaller number suffices; none do where `student_parameters` is None.
    """
    if student_parameters is None:
        return 1
    widths = {spec.channels for spec in teacher_specs}
    for shared in range(1, len(student_specs) + 1):
        owners = shared_among_neighbors(student_specs, shared)
        parameters = sum((spec.channels + 1) * width for spec in _first(student_specs, owners) for width in widths)
        if parameters < MAXIMUM_PROJECTION_SHARE * student_parameters:
            return shared
    return len(student_specs)


def shared_among_neighbors(specs: Sequence[FeatureSpec], shared: int) -> list[int]:
    """Return the index of each student layer's projections: one for `shared` neighbors of equal width."""
    owners: list[int] = []
    sharing = 0
    for s, spec in enumerate(specs):
        fits = bool(s) and spec.channels == specs[s - 1].channels and sharing < shared
        owners.append(owners[-1] if fits else (owners[-1] + 1 if s else 0))
        sharing = sharing + 1 if fits else 1
    return owners


def _first(specs: Sequence[FeatureSpec], owners: Sequence[int]) -> list[FeatureSpec]:
    """Return the first layer of each owner."""
    return [specs[owners.index(entry)] for entry in range(max(owners) + 1)]


def build_decoders(specs: Sequence[FeatureSpec]) -> nn.ModuleList:
    """Return a decoder of `DECODER_WIDTH` channels for each of these student layers."""
    return nn.ModuleList(FeatureDecoder(spec.channels, DECODER_WIDTH) for spec in specs)


class ZeroLinear(nn.Linear):
    """A zero-initialized linear layer: its input gets no gradient before its first step."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def build_shared_projections(
    student_specs: Sequence[FeatureSpec],
    teacher_specs: Sequence[FeatureSpec],
    owners: Sequence[int],
    *,
    decoded: bool,
    start: ProjectionInit,
) -> nn.ModuleList:
    """Return linear projections `[owner][str(width)]` of student layers, after decoders where `decoded`."""
    linear = ZeroLinear if start == "zero" else nn.Linear
    widths = sorted({teacher.channels for teacher in teacher_specs})
    read = [DECODER_WIDTH if decoded else spec.channels for spec in _first(student_specs, owners)]
    return nn.ModuleList(nn.ModuleDict({str(width): linear(channels, width) for width in widths}) for channels in read)


def build_pairwise_projections(
    student_specs: Sequence[FeatureSpec],
    teacher_specs: Sequence[FeatureSpec],
    alignments: Sequence[Sequence[Alignment]],
) -> nn.ModuleList:
    """Return the published projections `[s][t]`: convolutions, 3 x 3 where both layers are laid out on a grid."""
    return nn.ModuleList(
        nn.ModuleList(
            ConvolutionalProjection(student.channels, teacher.channels, 3 if pair.kind == "grid" else 1)
            for teacher, pair in zip(teacher_specs, row, strict=True)
        )
        for student, row in zip(student_specs, alignments, strict=True)
    )
