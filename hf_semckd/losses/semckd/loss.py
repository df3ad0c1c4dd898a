"""SemCKD (Chen et al., AAAI 2021; Wang et al., TKDE 2023): the published loss, and its calibrated form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...choices import Association, ProjectionInit, Projector, TargetNorm, check_projection_init
from ...errors import ConfigurationError, InputError, RaggedBatchError
from ...features.geometry import Alignment, fitting_mask
from ...features.layers import FeatureSpec
from ...features.precision import at_least_float32
from ...features.statistics import ChannelStatistics, merge_layers, standardization, update_layer_statistics
from ...features.summaries import Average, summary
from ..base import FeatureLoss, FeatureLossOutput, layer_count_message, layer_specs
from ..options import LossOptions
from ..similarity import similarity_matrix
from .alignment import AlignedStudent, find_pair_groups
from .association import (
    MAXIMUM_SCALE,
    FeatureEmbedding,
    SimilarityEmbedding,
    attention_weights,
    bound_of_cosine_weights,
    fixed_weights,
    kl_to_uniform,
    ragged_batch_message,
    similarity_weights,
)
from .comparison import pairwise_errors
from .defaults import IMAGE_DEFAULTS, feature_defaults
from .defaults import association_temperature as resolve_temperature
from .kernel import weighted_feature_error, weighted_relation_error
from .projection import (
    build_decoders,
    build_pairwise_projections,
    build_shared_projections,
    layers_per_projection,
    shared_among_neighbors,
)
from .selection import AssociationInput, TeacherSelection

Shape = FeatureSpec | Sequence[int]

SIMILARITIES = ("similarity", "sinkhorn")


class SemCKDLoss(FeatureLoss):
    """Every student layer learns from several teacher layers, weighed for each sample by an association.

    total = 1 / (B * S) * sum over samples i, student layers s and teacher layers t of
    weights[i, s, t] * (mean squared error(projection(F_s[i]), F_t[i]) + relation_weight * relation error[i, s, t]);
    the mean of the squared errors is over the layers that are compared, where some are spared.

    The relation error compares where both layers see a sample among the others of the batch
    (`weighted_error.weighted_relation_error`). It goes through no projection, so it teaches the student itself from
    the first step, and it is what the paper's similarity matrices say, which there only choose the weights. Learned
    weights are not trained by it.

    The calibrated form (the default) takes any batch size. It standardizes every teacher channel, projects a student
    layer once for all teacher layers of one width, and weighs by similarity, or by learned weights that cannot
    collapse (see `kl_to_uniform`). `SemCKDLoss.published` is the paper's form, `SemCKDLoss.for_layers` what
    a trainer makes for the models at hand: between CNNs, a student layer is read by a decoder first.

    Args:
        student_shapes: One (C, H, W), (tokens, C) or `FeatureSpec` for each student layer.
        teacher_shapes: The same for each teacher layer.
        association: How teacher layers are weighed; see `SemCKDConfig`.
        target_norm: Whether teacher channels are standardized.
        projector: `shared`, `convolutional` or `pairwise`; see `SemCKDConfig`.
        association_temperature: > 0; None for the association's default.
        batch_size: Needed by the published association only (`learned` on raw targets).
        tokens_aligned: Whether position n of both models stands for the same input.
        max_tokens: Most tokens of a sample that are compared, evenly spaced; None for all, as the pairwise projector
            always takes.
        max_grid: Maps are pooled to at most this many rows and columns before they are compared; None for no limit,
            which the pairwise projector never has.
        relation_weight: Weight of the relation error, >= 0; 0, the paper's form, leaves it out.
        layers_per_projection: How many neighboring student layers of one width share their (shared) projections.
        spared_layers: How many of the student's last layers are not projected and compared; relations still teach
            them, and their weights are still shown.
        projection_init: How linear projections start; see `SemCKDConfig`. None: at random, as published; a trainer
            lets them start at zero on text.

    Attributes:
        query, key: Networks of the learned association, one a compared student layer, one a teacher layer; else empty.
        projection: `projection[s][t]` (pairwise), or `projection[projection_of[s]][width]` (shared).
        projection_of: Which entry of `projection` each student layer uses; spared ones use none.
        decoder: What reads a student layer before its projections, one a compared layer; empty unless convolutional.
        compared: How many student layers are projected and compared: all but the spared ones.
        statistics: `ChannelStatistics`, one a teacher layer; empty without standardization.

    Raises:
        InputError: When there is no layer, or a shape is neither a map nor tokens.
        ConfigurationError: When the published association is asked for without a batch size, when convolutions would
            have to read what is no map, when pairwise projections would have to start at zero, or when no layer, or
            one that a fixed weight needs, would be left to compare.
    """

    default_weight: float = IMAGE_DEFAULTS.feature_weight

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
        max_tokens: int | None = None,
        max_grid: int | None = None,
        relation_weight: float = 0.0,
        layers_per_projection: int = 1,
        spared_layers: int = 0,
        projection_init: ProjectionInit | None = None,
    ):
        super().__init__()
        self.student_specs = layer_specs(student_shapes, "student")
        self.teacher_specs = layer_specs(teacher_shapes, "teacher")
        self.association: Association = association
        self.projector: Projector = projector
        self.projection_init: ProjectionInit = projection_init or "random"
        if association_temperature is None:
            association_temperature = resolve_temperature(
                LossOptions(association=association, target_norm=target_norm)
            )
        self.temperature = association_temperature
        self.relation_weight = relation_weight
        self.alignments = [
            [Alignment.of(student, teacher, tokens_aligned) for teacher in self.teacher_specs]
            for student in self.student_specs
        ]
        self._check_choices(spared_layers)
        self.compared = len(self.student_specs) - spared_layers
        channels = [spec.channels for spec in self.teacher_specs] if target_norm == "channel" else []
        self.statistics = nn.ModuleList(ChannelStatistics(width) for width in channels)
        self.projection_of = shared_among_neighbors(self.student_specs, projector, layers_per_projection)
        decoded = self.student_specs[: self.compared] if projector == "convolutional" else []
        self.decoder = build_decoders(decoded)
        self.projection = self._build_projections()
        self.query, self.key = nn.ModuleList(), nn.ModuleList()
        if association == "learned":
            self._build_learned_association(target_norm, batch_size)
        self.selection = TeacherSelection(
            self.teacher_specs,
            [] if projector == "pairwise" else self.alignments,
            self._association_input(),
            max_tokens,
            max_grid,
            relations=relation_weight > 0,
        )

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
    def for_layers(
        cls,
        student_specs: Sequence[FeatureSpec],
        teacher_specs: Sequence[FeatureSpec],
        options: LossOptions,
        *,
        tokens_aligned: bool = True,
        student_parameters: int | None = None,
    ) -> SemCKDLoss:
        """Return the loss that a configuration describes, for the layers that were found.

        Args:
            student_specs: The student's layers.
            teacher_specs: The teacher's layers.
            options: What the user chose.
            tokens_aligned: Whether position n of both models stands for the same input.
            student_parameters: Number of the student's parameters, beside which the projections are to stay small.
        """
        specs = (*student_specs, *teacher_specs)
        defaults = feature_defaults(
            options.projector,
            maps=all(spec.kind == "map" for spec in specs),
            images=all(spec.grid is not None for spec in specs),
        )
        spares = options.spares_last_layer and len(student_specs) > 1 and options.association != "last"
        projector = options.projector or defaults.projector
        start = None if projector == "pairwise" else defaults.projection_init
        loss = cls(
            student_specs,
            teacher_specs,
            association=options.association or defaults.association,
            target_norm=options.target_norm,
            projector=projector,
            association_temperature=resolve_temperature(options, defaults),
            batch_size=options.batch_size if options.depends_on_batch_size else None,
            tokens_aligned=tokens_aligned,
            max_tokens=options.max_tokens or None,
            max_grid=(defaults.max_grid if options.max_grid is None else options.max_grid) or None,
            relation_weight=defaults.relation_weight if options.relation_weight is None else options.relation_weight,
            layers_per_projection=layers_per_projection(student_specs, teacher_specs, student_parameters),
            spared_layers=defaults.spared_layers if spares else 0,
            projection_init=options.projection_init or start,
        )
        loss.default_weight = defaults.feature_weight
        return loss

    def forward(
        self,
        student_features: Sequence[Tensor],
        teacher_features: Sequence[Tensor] | Mapping[str, Tensor],
        student_mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> FeatureLossOutput:
        """Compare the features of a batch; see `FeatureLoss.forward`.

        Raises:
            InputError: When the number of features is not the number of layers.
            RaggedBatchError: In the published form, for a batch of another size.
        """
        self._check(student_features, teacher_features)
        targets = self.select(teacher_features, teacher_mask)
        if len(self.statistics) and self.training and self.collecting:
            self.update_statistics(targets)
            if self.automatic_synchronization:
                self.synchronize()
        views = self.views(student_features, student_mask, targets)
        weights = self._weights(views, targets)
        if self.projector == "pairwise":
            weighted, errors = self._pairwise_errors(views, targets, weights)
        else:
            weighted, errors = self._shared_errors(views, targets, weights)
        # The `last` control trains one student layer: an average over idle layers would only shrink it.
        last = self.association == "last"
        per_sample = weighted.sum(1) / (1 if last else self.compared)
        if self.relation_weight > 0:
            relations = self._relation_errors(views, targets, weights).sum(1)
            per_sample = per_sample + self.relation_weight * relations / (1 if last else len(self.student_specs))
        if self.association == "learned" and self.required_batch_size is None:
            per_sample = per_sample + kl_to_uniform(weights[:, : self.compared], self.temperature).mean(1)
        return FeatureLossOutput(per_sample.mean(), per_sample, weights.detach(), errors.detach())

    def views(self, features: Sequence[Tensor], mask: Tensor | None, targets: Mapping[str, Tensor]) -> AlignedStudent:
        """Return the student's features as they are compared.

        Args:
            features: S features of the student.
            mask: (B, N) mask of its tokens.
            targets: What `select` kept of the teacher.
        """
        return AlignedStudent(features, self.student_specs, mask, self.selection, targets, list(self.decoder))

    @property
    def needs_statistics(self) -> bool:
        """Whether teacher statistics are needed and nothing was observed yet."""
        return any(not bool(entry.count > 0) for entry in self._statistics())

    @property
    def settings(self) -> dict[str, Any]:
        """What is used of the settings that depend on the models."""
        return {
            "association": self.association,
            "association_temperature": self.temperature,
            "relation_weight": self.relation_weight,
            "projector": self.projector,
            "projection_init": self.projection_init,
            "max_grid": self.selection.max_grid or 0,
        }

    @property
    def samples_tokens(self) -> bool:
        """Whether only some of the tokens are compared."""
        return self.selection.samples_tokens

    @property
    def kept(self) -> str:
        """What `select` keeps, in words."""
        return self.selection.describe()

    def select(
        self,
        teacher_features: Sequence[Tensor] | Mapping[str, Tensor],
        teacher_mask: Tensor | None = None,
        phase: Tensor | None = None,
    ) -> Mapping[str, Tensor]:
        """Keep what is compared of the teacher's features, and what it is weighed by; see `TeacherSelection`."""
        if isinstance(teacher_features, Mapping):
            return teacher_features
        return self.selection(teacher_features, teacher_mask, phase)

    def update_statistics(
        self, teacher_features: Sequence[Tensor] | Mapping[str, Tensor], teacher_mask: Tensor | None = None
    ) -> None:
        """Collect teacher statistics without computing a loss."""
        if not len(self.statistics):
            return
        targets = self.select(teacher_features, teacher_mask)
        entries = self._statistics()
        values, masks = zip(*(self.selection.values_of(targets, t) for t in range(len(entries))), strict=True)
        update_layer_statistics(entries, values, masks)

    def synchronize(self, reduce_sum: Callable[[Tensor], Tensor] | None = None) -> None:
        """Merge what was observed since the last call, summed over processes in one reduction."""
        entries = self._statistics()
        if not entries:
            return
        pending = [entry.pending() for entry in entries]
        sums = torch.cat(pending) if reduce_sum is None else reduce_sum(torch.cat(pending))
        merge_layers(entries, sums.split([len(entry) for entry in pending]))

    def _statistics(self) -> list[ChannelStatistics]:
        return [entry for entry in self.statistics if isinstance(entry, ChannelStatistics)]

    def _association_input(self) -> AssociationInput:
        if self.projector == "pairwise" or self.required_batch_size is not None:
            return "whole"
        if self.association in SIMILARITIES:
            return "summary"
        return "mean" if self.association == "learned" else None

    def _build_projections(self) -> nn.ModuleList:
        if self.projector == "pairwise":
            return build_pairwise_projections(self.student_specs, self.teacher_specs, self.alignments)
        specs, owners = self.student_specs[: self.compared], self.projection_of[: self.compared]
        decoded = self.projector == "convolutional"
        return build_shared_projections(specs, self.teacher_specs, owners, decoded=decoded, start=self.projection_init)

    def _build_learned_association(self, target_norm: TargetNorm, batch_size: int | None) -> None:
        if target_norm == "channel":
            self.query.extend(FeatureEmbedding(spec.channels) for spec in self.student_specs[: self.compared])
            self.key.extend(FeatureEmbedding(spec.channels) for spec in self.teacher_specs)
            self.log_scale = nn.Parameter(torch.zeros(()))
            self.upper_bound = 1.0
            return
        if batch_size is None or batch_size < 1:
            raise ConfigurationError(
                "The published association needs the batch size",
                received=f"batch_size={batch_size}",
                expected="the number of samples in every batch",
                todo="pass batch_size, or use target_norm='channel', whose learned association takes any batch",
            )
        self.required_batch_size = batch_size
        self.query.extend(SimilarityEmbedding(batch_size) for _ in self.student_specs[: self.compared])
        self.key.extend(SimilarityEmbedding(batch_size) for _ in self.teacher_specs)
        self.upper_bound = bound_of_cosine_weights(self.temperature, len(self.teacher_specs))

    def _check_choices(self, spared_layers: int) -> None:
        """Refuse what does not fit together, once the layers are known."""
        check_projection_init(self.projector, self.projection_init)
        kinds = {pair.kind for row in self.alignments for pair in row}
        if self.projector == "convolutional" and kinds != {"grid"}:
            raise ConfigurationError(
                "The convolutional projector reads maps",
                received=f"layers that meet as {', '.join(sorted(kinds))}",
                expected="a CNN, or a transformer on images with a teacher of another grid",
                todo="use projector='shared'",
            )
        most = 0 if self.projector == "pairwise" or self.association == "last" else len(self.student_specs) - 1
        if not 0 <= spared_layers <= most:
            raise ConfigurationError(
                "So many student layers cannot be spared",
                received=f"spared_layers={spared_layers} of {len(self.student_specs)} layers, "
                f"projector={self.projector!r}, association={self.association!r}",
                expected=f"a number from 0 to {most}",
                todo=f"spare at most {most}",
            )

    def _check(
        self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor] | Mapping[str, Tensor]
    ) -> None:
        expected = (len(self.student_specs), len(self.teacher_specs))
        selected = isinstance(teacher_features, Mapping)
        received = (len(student_features), expected[1] if selected else len(teacher_features))
        if received != expected:
            raise InputError(layer_count_message(received, expected))
        size = len(student_features[0])
        if self.required_batch_size is not None and size != self.required_batch_size:
            raise RaggedBatchError(ragged_batch_message(size, self.required_batch_size))

    def _weights(self, views: AlignedStudent, targets: Mapping[str, Tensor]) -> Tensor:
        if self.association in ("uniform", "last", "one_to_one"):
            like = at_least_float32(views.features[0])
            return fixed_weights(self.association, len(self.student_specs), len(self.teacher_specs), like)
        if self.association in SIMILARITIES:
            shown = [
                self.projector != "pairwise" and any(pair.kind == "grid" for pair in row) for row in self.alignments
            ]
            student = [views.summary(s, shown[s]) for s in range(len(self.student_specs))]
            teacher = [self._teacher_summary(targets, t) for t in range(len(self.teacher_specs))]
            return similarity_weights(student, teacher, self.temperature, self.association == "sinkhorn")
        if self.required_batch_size is not None:
            raw = zip(self.query, views.features[: self.compared], strict=True)
            queries = [net(_raw_similarity(feature, views.mask)) for net, feature in raw]
            mask = targets.get("mask")
            keys = [net(_raw_similarity(targets[f"whole.{t}"], mask)) for t, net in enumerate(self.key)]
            return self._with_spared(attention_weights(queries, keys, 1.0 / self.temperature))
        queries = [net(views.mean(s)) for s, net in enumerate(self.query)]
        keys = [net(self._teacher_mean(targets, t)) for t, net in enumerate(self.key)]
        scale = self.log_scale.clamp(max=math.log(MAXIMUM_SCALE)).exp()
        return self._with_spared(attention_weights(queries, keys, scale))

    def _with_spared(self, weights: Tensor) -> Tensor:
        """Add equal weights for the layers that are not compared, and so have nothing to learn them by."""
        spared = len(self.student_specs) - self.compared
        if not spared:
            return weights
        return torch.cat(
            [weights, weights.new_full((len(weights), spared, weights.shape[2]), 1 / weights.shape[2])], 1
        )

    def _teacher_summary(self, targets: Mapping[str, Tensor], t: int) -> Tensor:
        if f"whole.{t}" in targets:
            return summary(targets[f"whole.{t}"], self.teacher_specs[t], Average(targets.get("mask")))
        return at_least_float32(self.selection.summary_of(targets, t))

    def _teacher_mean(self, targets: Mapping[str, Tensor], t: int) -> Tensor:
        whole = targets.get(f"whole.{t}")
        mean = targets[f"mean.{t}"] if whole is None else Average(targets.get("mask"))(whole)
        return self._standardized(t, mean.unsqueeze(1)).squeeze(1)

    def _standardized(self, t: int, values: Tensor) -> Tensor:
        """Return values of teacher layer t in their statistics' units, or as they are; at least in float32."""
        return self.statistics[t](values) if len(self.statistics) else at_least_float32(values)

    def _standardization(self, teachers: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """Return mean and scale (T', C) of some teacher layers of one width, or None for raw targets."""
        return standardization([self._statistics()[t] for t in teachers]) if len(self.statistics) else (None, None)

    def _shared_errors(
        self, views: AlignedStudent, targets: Mapping[str, Tensor], weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        weighted: list[list[Tensor]] = [[] for _ in range(self.compared)]
        errors: dict[tuple[int, int], Tensor] = {}
        for meeting, students in find_pair_groups(views, self.alignments[: self.compared], self.teacher_specs).items():
            teachers = meeting.teachers
            features = [views.at(s, meeting) for s in students]
            linears = [self._linear(s, meeting.width) for s in students]
            projections = [(linear.weight, linear.bias) for linear in linears]
            if any(hasattr(linear.weight, "ds_id") for linear in linears):
                # ZeRO-3 gathers a weight when its module is called, and not before.
                features = [linear(x.to(linear.bias.dtype)) for linear, x in zip(linears, features, strict=True)]
                projections = []
            center, scale = self._standardization(teachers)
            values, pairs = weighted_feature_error(
                features,
                [self.selection.at(targets, t, meeting.size, meeting.kind) for t in teachers],
                _part(weights, students, teachers),
                views.mask_at(students[0], meeting),
                projections=projections or None,
                center=center,
                scale=scale,
            )
            if (len(students), len(teachers)) == (self.compared, len(self.teacher_specs)):
                # All meet: nothing to put together.
                return values, self._with_idle(pairs)
            for index, s in enumerate(students):
                weighted[s].append(values[:, index])
                errors |= {(s, t): pairs[:, index, position] for position, t in enumerate(teachers)}
        rows = [torch.stack([errors[s, t] for t in range(len(self.teacher_specs))], 1) for s in range(len(weighted))]
        return torch.stack([torch.stack(parts).sum(0) for parts in weighted], 1), self._with_idle(torch.stack(rows, 1))

    def _with_idle(self, errors: Tensor) -> Tensor:
        """Return errors (B, compared, T) with NaN for the layers that are not compared (B, S, T)."""
        idle = len(self.student_specs) - self.compared
        return F.pad(errors, (0, 0, 0, idle), value=math.nan) if idle else errors

    def _relation_errors(self, views: AlignedStudent, targets: Mapping[str, Tensor], weights: Tensor) -> Tensor:
        student = [views.embedding(s) for s in range(len(self.student_specs))]
        teacher = [targets[f"embedding.{t}"] for t in range(len(self.teacher_specs))]
        return weighted_relation_error(student, teacher, weights)

    def _linear(self, s: int, width: int) -> nn.Linear:
        return self.projection[self.projection_of[s]][str(width)]  # type: ignore[index]

    def _pairwise_errors(
        self, views: AlignedStudent, targets: Mapping[str, Tensor], weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        taught = [self._standardized(t, targets[f"whole.{t}"]) for t in range(len(self.teacher_specs))]
        errors = pairwise_errors(
            self.projection, views, taught, self.teacher_specs, self.alignments, targets.get("mask")
        )
        return (weights * errors).sum(2), errors


def _part(weights: Tensor, students: Sequence[int], teachers: Sequence[int]) -> Tensor:
    """Return the weights (B, S', T') of some layers; a list as an index would make the host wait for the device."""
    if (len(students), len(teachers)) == tuple(weights.shape[1:]):
        return weights
    return torch.stack([torch.stack([weights[:, s, t] for t in teachers], 1) for s in students], 1)


def _raw_similarity(feature: Tensor, mask: Tensor | None) -> Tensor:
    return similarity_matrix(feature, fitting_mask(mask, feature))
