"""The comparison: the error of each projected student layer against each teacher layer, for each sample.

Features F_s and F_t of student layer s and teacher layer t, at the positions n they share and with channels c:

    error[i,s,t] = mean over n and c of (P_st(F_s)[i,n,c] - F_t[i,n,c])^2

    shared       P_st is linear, one per student layer (or a few neighboring ones) and teacher width; between maps
                 a decoder of convolutions may read the student's first. Teacher channels may be standardized.
    pairwise     P_st is a stack of convolutions per pair, as published.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...choices import ProjectionInit
from ...errors import ConfigurationError
from ...features.geometry import Alignment, as_map, common_grid, compared_positions, map_to_tokens
from ...features.layers import FeatureSpec
from ..fitting import check_same_positions
from ..positions import squared_error
from .alignment import AlignedStudent, AlignedTeacher, PairGroup, find_pair_groups
from .kernel import weighted_feature_error
from .projection import build_decoders, build_pairwise_projections, build_shared_projections, shared_among_neighbors


class Comparison(ABC):
    """A way to project student layers and compare them with teacher layers; `SemCKDLoss` registers its networks.

    `alignments` are S x T. Only the first `compared` student layers are compared: their maps are read by `decoder`,
    which may be empty, and projected by the entries `projection_of` of `projection`.
    """

    alignments: list[list[Alignment]]
    compared: int
    keeps_whole: bool = False  # Whether the teacher's whole features are needed.
    decoder: nn.ModuleList
    projection: nn.ModuleList
    projection_of: list[int]

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Trained modules by the names under which the loss registers them."""
        return {"decoder": self.decoder, "projection": self.projection}

    @abstractmethod
    def errors(self, student: AlignedStudent, teacher: AlignedTeacher, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return sum_t weights * error (B, compared), and the errors (B, compared, T), for weights (B, S, T)."""


class SharedComparison(Comparison):
    """Linear projections, one for all teacher layers of one width, and a fused error without a tensor for each pair.

    That of student layer s is `projection[projection_of[s]][str(width)]`, after a decoder where `decoded`:
    `ConfigurationError` if not all layers are compared as maps then.
    """

    def __init__(
        self,
        student_specs: Sequence[FeatureSpec],
        teacher_specs: Sequence[FeatureSpec],
        alignments: list[list[Alignment]],
        *,
        compared: int,
        decoded: bool = False,
        layers_per_projection: int = 1,
        start: ProjectionInit = "random",
    ):
        kinds = {pair.kind for row in alignments for pair in row}
        if decoded and kinds != {"grid"}:
            raise ConfigurationError(
                "The convolutional projector reads maps",
                received=f"layers that are compared as {', '.join(sorted(kinds))}",
                expected="a CNN, or a transformer on images with a teacher of another grid",
                todo="use projector='shared'",
            )
        self.alignments, self.compared = alignments, compared
        self.projection_of = shared_among_neighbors(student_specs, 1 if decoded else layers_per_projection)
        specs, owners = student_specs[:compared], self.projection_of[:compared]
        self.decoder = build_decoders(specs if decoded else [])
        self.projection = build_shared_projections(specs, teacher_specs, owners, decoded=decoded, start=start)

    def errors(self, student: AlignedStudent, teacher: AlignedTeacher, weights: Tensor) -> tuple[Tensor, Tensor]:
        """See `Comparison.errors`."""
        layers = len(teacher.specs)
        weighted: list[list[Tensor]] = [[] for _ in range(self.compared)]
        errors: dict[tuple[int, int], Tensor] = {}
        for group, students in find_pair_groups(student, self.alignments[: self.compared]).items():
            values, pairs = self._group_errors(student, weights, group, students)
            if (len(students), len(group.teachers)) == (self.compared, layers):
                return values, pairs
            for index, s in enumerate(students):
                weighted[s].append(values[:, index])
                errors |= {(s, t): pairs[:, index, position] for position, t in enumerate(group.teachers)}
        rows = [torch.stack([errors[s, t] for t in range(layers)], 1) for s in range(self.compared)]
        return torch.stack([torch.stack(parts).sum(0) for parts in weighted], 1), torch.stack(rows, 1)

    def _group_errors(
        self, student: AlignedStudent, weights: Tensor, group: PairGroup, students: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        features = [student.at(s, group) for s in students]
        linears = [self._linear(s, group.width) for s in students]
        projections = [(linear.weight, linear.bias) for linear in linears]
        if any(hasattr(linear.weight, "ds_id") for linear in linears):
            # ZeRO-3 gathers a weight when its module is called, and not before.
            features = [linear(x.to(linear.bias.dtype)) for linear, x in zip(linears, features, strict=True)]
            projections = []
        teacher = student.teacher
        targets = [teacher.at(t, group) for t in group.teachers]
        check_same_positions([*features, *targets])
        center, scale = teacher.standardization(group.teachers)
        return weighted_feature_error(
            features,
            targets,
            _part(weights, students, group.teachers),
            student.mask_at(students[0], group),
            projections=projections or None,
            center=center,
            scale=scale,
        )

    def _linear(self, s: int, width: int) -> nn.Linear:
        return self.projection[self.projection_of[s]][str(width)]  # type: ignore[index]


class PairwiseComparison(Comparison):
    """The published projections, convolutions for every pair; `projection[s][t]` is a `ConvolutionalProjection`.

    Maps are pooled once for all pairs of one size, in the memory layout in which convolutions are fastest.
    """

    keeps_whole = True

    def __init__(
        self,
        student_specs: Sequence[FeatureSpec],
        teacher_specs: Sequence[FeatureSpec],
        alignments: list[list[Alignment]],
    ):
        self.alignments, self.compared = alignments, len(student_specs)
        self.projection_of = list(range(self.compared))
        self.decoder = nn.ModuleList()
        self.projection = build_pairwise_projections(student_specs, teacher_specs, alignments)

    def errors(self, student: AlignedStudent, teacher: AlignedTeacher, weights: Tensor) -> tuple[Tensor, Tensor]:
        """See `Comparison.errors`."""
        targets = [teacher.standardized(t, teacher.targets.whole(t)) for t in range(len(teacher.specs))]
        pooled: dict[tuple[int, tuple[int, int]], Tensor] = {}
        rows = []
        for s, (feature, spec) in enumerate(zip(student.features, student.specs, strict=True)):
            maps: dict[tuple[int, int], Tensor] = {}
            row = []
            for t, target in enumerate(targets):
                net = self.projection[s][t]  # type: ignore[index]
                dtype = net[0].weight.dtype
                if self.alignments[s][t].kind != "grid":
                    pair = (feature, spec), (target, teacher.specs[t])
                    masks = student.mask(s), teacher.mask(t)
                    own, aligned, mask = compared_positions(self.alignments[s][t], *pair, *masks)
                    row.append(squared_error(net.project_tokens(own.to(dtype), mask), aligned, mask))
                    continue
                size = common_grid(feature, spec, target, teacher.specs[t])
                if size not in maps:
                    own = as_map(feature, spec, size).to(dtype)
                    maps[size] = own.contiguous(memory_format=torch.channels_last)
                if (t, size) not in pooled:
                    pooled[t, size] = map_to_tokens(as_map(target, teacher.specs[t], size))
                row.append(squared_error(map_to_tokens(net(maps[size])), pooled[t, size]))
            rows.append(torch.stack(row, 1))
        errors = torch.stack(rows, 1)
        return (weights * errors).sum(2), errors


def _part(weights: Tensor, students: Sequence[int], teachers: Sequence[int]) -> Tensor:
    """Return the weights (B, S', T') of some layers; indexing with a list would be a host sync."""
    if (len(students), len(teachers)) == tuple(weights.shape[1:]):
        return weights
    return torch.stack([torch.stack([weights[:, s, t] for t in teachers], 1) for s in students], 1)
