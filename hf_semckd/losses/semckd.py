"""SemCKD (Chen et al., AAAI 2021; Wang et al., TKDE 2023): the published loss, and its calibrated form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..calibration import (
    MAXIMUM_SCALE,
    Alignment,
    ConvolutionalProjection,
    FeatureEmbedding,
    SimilarityEmbedding,
    as_map,
    as_mean,
    as_tokens,
    attention_weights,
    bound_of_cosine_weights,
    common_grid,
    fixed_weights,
    free_energy,
    ragged_batch_message,
    similarity_weights,
    summary,
)
from ..config import Association, Projector, SemCKDConfig, TargetNorm, default_association_temperature
from ..errors import ConfigurationError, InputError, RaggedBatchError, message
from ..features import FeatureSpec
from ..functional import at_least_float32, map_to_tokens, similarity_matrix, squared_error, weighted_feature_error
from ..normalization import ChannelStatistics
from .base import FeatureLoss, FeatureLossOutput

Shape = FeatureSpec | Sequence[int]


class SemCKDLoss(FeatureLoss):
    """Every student layer learns from several teacher layers, weighed for each sample by an association.

    total = 1 / (B * S) * sum over samples i, student layers s and teacher layers t of
    weights[i, s, t] * mean squared error(projection(F_s[i]), F_t[i]).

    The calibrated form (the default) takes any batch size. It standardises every teacher channel, projects a student
    layer once for all teacher layers of one width, and weighs by similarity, or by learned weights that cannot
    collapse (see `calibration.free_energy`). `SemCKDLoss.published` is the paper's form.

    Args:
        student_shapes: One (C, H, W), (tokens, C) or `FeatureSpec` for each student layer.
        teacher_shapes: The same for each teacher layer.
        association: How teacher layers are weighed; see `SemCKDConfig`.
        target_norm: Whether teacher channels are standardised.
        projector: `shared` or `pairwise`.
        association_temperature: > 0; None for the association's default.
        batch_size: Needed by the published association only (`learned` on raw targets).
        tokens_aligned: Whether position n of both models stands for the same input.

    Attributes:
        query, key: Networks of the learned association, one a student layer and one a teacher layer; else empty.
        projection: `projection[s][t]` (pairwise), or `projection[s][width]` (shared).
        statistics: `ChannelStatistics`, one a teacher layer; empty without standardisation.

    Raises:
        InputError: When there is no layer, or a shape is neither a map nor tokens.
        ConfigurationError: When the published association is asked for without a batch size.
    """

    def __init__(
        self,
        student_shapes: Sequence[Shape],
        teacher_shapes: Sequence[Shape],
        *,
        association: Association = "similarity",
        target_norm: TargetNorm = "channel",
        projector: Projector = "shared",
        association_temperature: float | None = None,
        batch_size: int | None = None,
        tokens_aligned: bool = True,
    ):
        super().__init__()
        self.student_specs = _specs(student_shapes, "student")
        self.teacher_specs = _specs(teacher_shapes, "teacher")
        self.association: Association = association
        self.projector: Projector = projector
        if association_temperature is None:
            association_temperature = default_association_temperature(association, target_norm)
        self.temperature = association_temperature
        self.alignments = [
            [Alignment.of(student, teacher, tokens_aligned) for teacher in self.teacher_specs]
            for student in self.student_specs
        ]
        channels = [spec.channels for spec in self.teacher_specs] if target_norm == "channel" else []
        self.statistics = nn.ModuleList(ChannelStatistics(width) for width in channels)
        self.projection = self._build_projections()
        self.query, self.key = nn.ModuleList(), nn.ModuleList()
        if association == "learned":
            self._build_learned_association(target_norm, batch_size)
        elif association == "similarity":
            self.upper_bound = bound_of_cosine_weights(association_temperature, len(self.teacher_specs))

    @classmethod
    def published(
        cls, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape], batch_size: int
    ) -> SemCKDLoss:
        """Return the paper's loss: learned weights on raw similarity rows, raw targets, a projection for every pair.

        Args:
            student_shapes: One shape a student layer, without the batch dimension.
            teacher_shapes: One shape a teacher layer.
            batch_size: B, the only batch size it then takes; d = B / 4.
        """
        return cls(
            student_shapes,
            teacher_shapes,
            association="learned",
            target_norm="none",
            projector="pairwise",
            association_temperature=1.0,
            batch_size=batch_size,
        )

    @classmethod
    def from_config(
        cls,
        student_specs: Sequence[FeatureSpec],
        teacher_specs: Sequence[FeatureSpec],
        config: SemCKDConfig,
        *,
        tokens_aligned: bool = True,
    ) -> SemCKDLoss:
        """Return the loss that a configuration describes, for the layers that were found."""
        return cls(
            student_specs,
            teacher_specs,
            association=config.association,
            target_norm=config.target_norm,
            projector=config.projector,
            association_temperature=config.resolved_association_temperature(),
            batch_size=config.per_device_train_batch_size if config.depends_on_batch_size else None,
            tokens_aligned=tokens_aligned,
        )

    def forward(
        self,
        student_features: Sequence[Tensor],
        teacher_features: Sequence[Tensor],
        student_mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> FeatureLossOutput:
        """Compare the features of a batch; see `FeatureLoss.forward`.

        Raises:
            InputError: When the number of features is not the number of layers.
            RaggedBatchError: In the published form, for a batch of another size.
        """
        self._check(student_features, teacher_features)
        teacher_features = [feature.detach() for feature in teacher_features]
        targets = self._targets(teacher_features, teacher_mask)
        weights = self._weights(student_features, teacher_features, targets, student_mask, teacher_mask)
        if self.projector == "shared":
            weighted, errors = self._shared_errors(student_features, targets, weights, student_mask, teacher_mask)
        else:
            weighted, errors = self._pairwise_errors(student_features, targets, weights, student_mask, teacher_mask)
        # The `last` control trains one student layer: an average over idle layers would only shrink it.
        active = 1 if self.association == "last" else len(self.student_specs)
        per_sample = weighted.sum(1) / active
        if self.association == "learned" and self.required_batch_size is None:
            per_sample = per_sample + free_energy(weights, self.temperature).mean(1)
        return FeatureLossOutput(per_sample.mean(), per_sample, weights.detach(), errors.detach())

    @property
    def needs_statistics(self) -> bool:
        """Whether teacher statistics are needed and nothing was observed yet."""
        return any(not bool(entry.count > 0) for entry in self._statistics())

    def observe(self, teacher_features: Sequence[Tensor], teacher_mask: Tensor | None = None) -> None:
        """Collect teacher statistics without computing a loss."""
        for entry, feature in zip(self._statistics(), teacher_features, strict=False):
            entry.observe(as_tokens(feature) if feature.dim() == 2 else feature, _fitting(teacher_mask, feature))

    def synchronize(self, reduce_sum: Callable[[Tensor], Tensor] | None = None) -> None:
        """Merge what was observed since the last call, summed over processes in one reduction."""
        entries = self._statistics()
        if not entries:
            return
        pending = [entry.pending() for entry in entries]
        sums = torch.cat(pending) if reduce_sum is None else reduce_sum(torch.cat(pending))
        for entry, part in zip(entries, sums.split([len(entry) for entry in pending]), strict=True):
            entry.merge(part)

    def _statistics(self) -> list[ChannelStatistics]:
        return [entry for entry in self.statistics if isinstance(entry, ChannelStatistics)]

    def _build_projections(self) -> nn.ModuleList:
        projections: list[nn.Module] = []
        for student, alignments in zip(self.student_specs, self.alignments, strict=True):
            if self.projector == "shared":
                widths = sorted({teacher.channels for teacher in self.teacher_specs})
                projections.append(nn.ModuleDict({str(width): nn.Linear(student.channels, width) for width in widths}))
                continue
            pairs = zip(self.teacher_specs, alignments, strict=True)
            projections.append(
                nn.ModuleList(
                    ConvolutionalProjection(student.channels, teacher.channels, 3 if pair.kind == "grid" else 1)
                    for teacher, pair in pairs
                )
            )
        return nn.ModuleList(projections)

    def _build_learned_association(self, target_norm: TargetNorm, batch_size: int | None) -> None:
        if target_norm == "channel":
            self.query.extend(FeatureEmbedding(spec.channels) for spec in self.student_specs)
            self.key.extend(FeatureEmbedding(spec.channels) for spec in self.teacher_specs)
            self.log_scale = nn.Parameter(torch.zeros(()))
            self.upper_bound = 1.0
            return
        if batch_size is None or batch_size < 1:
            raise ConfigurationError(
                message(
                    "The published association needs the batch size",
                    received=f"batch_size={batch_size}",
                    expected="the number of samples in every batch",
                    todo="pass batch_size, or use target_norm='channel', whose learned association takes any batch",
                )
            )
        self.required_batch_size = batch_size
        self.query.extend(SimilarityEmbedding(batch_size) for _ in self.student_specs)
        self.key.extend(SimilarityEmbedding(batch_size) for _ in self.teacher_specs)
        self.upper_bound = bound_of_cosine_weights(self.temperature, len(self.teacher_specs))

    def _check(self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> None:
        received = (len(student_features), len(teacher_features))
        expected = (len(self.student_specs), len(self.teacher_specs))
        if received != expected:
            raise InputError(
                message(
                    "The number of features is not the number of layers that the loss was built for",
                    received=f"{received[0]} student and {received[1]} teacher features",
                    expected=f"{expected[0]} and {expected[1]}",
                    todo="pass one feature for each shape given at construction, in the same order",
                )
            )
        size = len(student_features[0])
        if self.required_batch_size is not None and size != self.required_batch_size:
            raise RaggedBatchError(ragged_batch_message(size, self.required_batch_size))

    def _targets(self, teacher_features: list[Tensor], mask: Tensor | None) -> list[Tensor]:
        if not len(self.statistics):
            return teacher_features
        if self.training and self.collecting:
            self.observe(teacher_features, mask)
            if self.automatic_synchronization:
                self.synchronize()
        return [entry(feature) for entry, feature in zip(self._statistics(), teacher_features, strict=True)]

    def _weights(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        targets: Sequence[Tensor],
        student_mask: Tensor | None,
        teacher_mask: Tensor | None,
    ) -> Tensor:
        if self.association == "similarity":
            return similarity_weights(
                [summary(x, spec, student_mask) for x, spec in zip(student, self.student_specs, strict=True)],
                [summary(x, spec, teacher_mask) for x, spec in zip(teacher, self.teacher_specs, strict=True)],
                self.temperature,
            )
        if self.association != "learned":
            weights = fixed_weights(self.association, len(student), len(teacher))
            like = at_least_float32(student[0])
            return weights.to(like.device, like.dtype).expand(len(like), -1, -1)
        if self.required_batch_size is not None:
            queries = [net(_raw_similarity(x, student_mask)) for net, x in zip(self.query, student, strict=True)]
            keys = [net(_raw_similarity(x, teacher_mask)) for net, x in zip(self.key, teacher, strict=True)]
            return attention_weights(queries, keys, 1.0 / self.temperature)
        queries = [net(as_mean(x, student_mask)) for net, x in zip(self.query, student, strict=True)]
        keys = [net(as_mean(x, teacher_mask)) for net, x in zip(self.key, targets, strict=True)]
        return attention_weights(queries, keys, self.log_scale.clamp(max=math.log(MAXIMUM_SCALE)).exp())

    def _shared_errors(
        self,
        student: Sequence[Tensor],
        targets: Sequence[Tensor],
        weights: Tensor,
        student_mask: Tensor | None,
        teacher_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        weighted, errors = [], []
        for s, feature in enumerate(student):
            row: list[Tensor | None] = [None] * len(targets)
            total = weights.new_zeros(len(feature))
            for (width, _, _), members in self._groups(s, feature, targets).items():
                aligned = [self._align(s, t, feature, targets[t], student_mask, teacher_mask) for t in members]
                positions, _, mask = aligned[0]
                linear = self.projection[s][str(width)]  # type: ignore[index]
                projected = linear(positions.to(linear.weight.dtype)).to(aligned[0][1].dtype)
                value, pair = weighted_feature_error(
                    projected, [entry[1] for entry in aligned], weights[:, s, members], mask
                )
                total = total + value
                for index, t in enumerate(members):
                    row[t] = pair[:, index]
            weighted.append(total)
            errors.append(torch.stack([entry for entry in row if entry is not None], 1))
        return torch.stack(weighted, 1), torch.stack(errors, 1)

    def _groups(self, s: int, feature: Tensor, targets: Sequence[Tensor]) -> dict[tuple[int, str, object], list[int]]:
        """Gather teacher layers that student layer s meets with one projection at the same positions."""
        groups: dict[tuple[int, str, object], list[int]] = {}
        for t, (target, spec) in enumerate(zip(targets, self.teacher_specs, strict=True)):
            kind = self.alignments[s][t].kind
            size = common_grid(feature, self.student_specs[s], target, spec) if kind == "grid" else None
            groups.setdefault((spec.channels, kind, size), []).append(t)
        return groups

    def _align(
        self,
        s: int,
        t: int,
        feature: Tensor,
        target: Tensor,
        student_mask: Tensor | None,
        teacher_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return a pair as tokens (B, N, C_s) and (B, N, C_t), with the mask (B, N) of the positions that count."""
        kind = self.alignments[s][t].kind
        if kind == "mean":
            return as_mean(feature, student_mask).unsqueeze(1), as_mean(target, teacher_mask).unsqueeze(1), None
        if kind == "tokens":
            fitting = _fitting(student_mask, feature), _fitting(teacher_mask, target)
            masks = [mask for mask in fitting if mask is not None]
            mask = None if not masks else masks[0] if len(masks) == 1 else masks[0] * masks[1]
            return as_tokens(feature), as_tokens(target), mask
        size = common_grid(feature, self.student_specs[s], target, self.teacher_specs[t])
        student_map = as_map(feature, self.student_specs[s], size)
        return map_to_tokens(student_map), map_to_tokens(as_map(target, self.teacher_specs[t], size)), None

    def _pairwise_errors(
        self,
        student: Sequence[Tensor],
        targets: Sequence[Tensor],
        weights: Tensor,
        student_mask: Tensor | None,
        teacher_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        rows = []
        for s, feature in enumerate(student):
            row = []
            for t, target in enumerate(targets):
                projection = self.projection[s][t]  # type: ignore[index]
                positions, aligned, mask = self._align(s, t, feature, target, student_mask, teacher_mask)
                positions = positions.to(projection[0].weight.dtype)
                if self.alignments[s][t].kind == "grid":
                    size = common_grid(feature, self.student_specs[s], target, self.teacher_specs[t])
                    projected = map_to_tokens(projection(positions.transpose(1, 2).unflatten(2, size)))
                else:
                    projected = projection.project_tokens(positions, mask)
                row.append(squared_error(projected, aligned, mask))
            rows.append(torch.stack(row, 1))
        errors = torch.stack(rows, 1)
        return (weights * errors).sum(2), errors


def _specs(shapes: Sequence[Shape], role: str) -> list[FeatureSpec]:
    if not len(shapes):
        raise InputError(
            message(
                f"There is no {role} layer",
                received="an empty list of shapes",
                expected="at least one",
                todo=f"give one shape for every {role} layer",
            )
        )
    return [
        shape if isinstance(shape, FeatureSpec) else FeatureSpec.from_shape(shape, f"{role} {index}")
        for index, shape in enumerate(shapes)
    ]


def _raw_similarity(feature: Tensor, mask: Tensor | None) -> Tensor:
    return similarity_matrix(feature, _fitting(mask, feature))


def _fitting(mask: Tensor | None, feature: Tensor) -> Tensor | None:
    """Return the mask where it speaks of this feature's positions: tokens, not maps and not vectors."""
    return mask if mask is not None and feature.dim() == 3 and feature.shape[1] == mask.shape[1] else None
