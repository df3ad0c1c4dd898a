"""What reads and projects the student's layers: which layers share a projection, and the modules themselves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..calibration import Alignment, ConvolutionalProjection, FeatureDecoder
from ..config import ProjectionStart, Projector
from ..features import FeatureSpec

# Channels inside a decoder. The published projections have twice the teacher's, at many times the price.
DECODER_WIDTH = 64
# Neighbouring student layers share projections where these would weigh more than this share of the student.
MAXIMUM_PROJECTION_SHARE = 0.2


def layers_per_projection(
    student_specs: Sequence[FeatureSpec], teacher_specs: Sequence[FeatureSpec], student_parameters: int | None
) -> int:
    """Return how many neighbouring student layers have to share a projection for all of them to stay small.

    Neighbouring layers of a transformer write into one residual stream, so that one basis serves them.

    Args:
        student_specs: The student's layers.
        teacher_specs: The teacher's layers.
        student_parameters: The size of the student; None when it does not matter.

    Returns:
        The smallest number that keeps the projections under `MAXIMUM_PROJECTION_SHARE` of the student, or the number
        of student layers where none does.
    """
    if student_parameters is None:
        return 1
    widths = {spec.channels for spec in teacher_specs}
    for shared in range(1, len(student_specs) + 1):
        owners = shared_among_neighbours(student_specs, "shared", shared)
        parameters = sum((spec.channels + 1) * width for spec in _first(student_specs, owners) for width in widths)
        if parameters < MAXIMUM_PROJECTION_SHARE * student_parameters:
            return shared
    return len(student_specs)


def shared_among_neighbours(specs: Sequence[FeatureSpec], projector: Projector, shared: int) -> list[int]:
    """Return the index of each student layer's projections: one for `shared` neighbours of equal width."""
    owners: list[int] = []
    sharing = 0
    for s, spec in enumerate(specs):
        fits = bool(s) and projector == "shared" and spec.channels == specs[s - 1].channels and sharing < shared
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
    """A linear layer that starts at zero: it learns from the first step, what it reads only once it has learned."""

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
    start: ProjectionStart,
) -> nn.ModuleList:
    """Return linear projections `[owner][str(width)]` of student layers, one for each width among teacher layers.

    Args:
        student_specs: The student layers that are compared.
        teacher_specs: The teacher's layers.
        owners: Which projections each of these student layers uses; see `shared_among_neighbours`.
        decoded: Whether a decoder reads a layer first.
        start: See `SemCKDConfig.projection_start`.
    """
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
