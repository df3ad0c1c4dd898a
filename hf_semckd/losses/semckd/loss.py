"""SemCKD (Chen et al., AAAI 2021; Wang et al., TKDE 2023): an association and a comparison.

The loss of sample i, with student layers s and teacher layers t:

    loss[i] = 1/S * sum_s sum_t alpha[i,s,t] * error[i,s,t]               see `association`, `comparison`
            + relation_weight * 1/S * sum_s sum_t alpha[i,s,t] * relation[i,s,t]
            + penalty[i]                                                  of learned weights
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ...choices import Association as AssociationName
from ...choices import ProjectionInit, Projector, TargetNorm, check_projection_init
from ...errors import ConfigurationError
from ...features.geometry import Alignment, summary_width
from ...features.layers import FeatureSpec
from ...features.precision import smallest_length
from ...features.statistics import TeacherStatistics, update_layer_statistics
from ...features.targets import LayerMasks, TeacherTargets
from ..base import FeatureLoss, FeatureLossOutput, LossOptions, Shape, layer_specs
from .alignment import AlignedStudent, AlignedTeacher
from .association import (
    Association,
    FixedAssociation,
    LearnedAssociation,
    PublishedAssociation,
    SimilarityAssociation,
    SinkhornAssociation,
)
from .bank import SimilarityBank
from .comparison import Comparison, PairwiseComparison, SharedComparison
from .defaults import IMAGE_DEFAULTS, association_temperature, feature_defaults
from .kernel import weighted_relation_error
from .projection import layers_per_projection
from .selection import TeacherSelection

# The networks of an association and a comparison, in the order in which their parameters are listed.
NETWORKS = ("scale", "decoder", "projection", "query", "key", "bank")


class SemCKDLoss(FeatureLoss):
    """Every student layer learns from several teacher layers, weighted for each sample by an association.

    error is the mean squared error of the projected student layer and the teacher layer; its sum over s is divided by
    the number of compared layers. relation is the error of a sample's distances to the others of the batch
    (`kernel.weighted_relation_error`): it needs no projection, so it trains the student itself from the first step,
    and makes a loss of the paper's similarity matrices, which there only give weights. It does not train learned
    weights.

    The default form takes any batch size: it standardizes every teacher channel, projects a student layer once for all
    teacher layers of one width, and weighs by similarity, or by learned weights that cannot collapse. `published` is
    the paper's form, `for_layers` the one a trainer makes for the models at hand.

    Args:
        student_shapes: One (C, H, W), (tokens, C) or `FeatureSpec` per student layer.
        teacher_shapes: The same for each teacher layer.
        association: A name, see `SemCKDConfig`, or an `Association`.
        batch_size: Needed by the published association only (`learned` on raw targets).
        association_bank: Number of recent samples that similarities are taken to; 0 for the batch's own.
        tokens_aligned: Whether position n of both models stands for the same input.
        max_tokens: Most tokens of a sample that are compared, evenly spaced; None for all.
        max_grid: Maps are pooled to at most this many rows and columns before they are compared; None for no limit.
            The pairwise projector compares all tokens and whole maps.
        layers_per_projection: How many neighboring student layers of one width share their (shared) projections.
        spared_layers: How many of the student's last layers are not compared; relations still train them, and their
            weights are still shown.

    Attributes:
        query, key: Networks of a learned association, one per compared student layer and one per teacher layer.
        projection: `projection[s][t]` (pairwise), or `projection[comparison.projection_of[s]][str(width)]` (shared).
        decoder: Modules that read a student layer's map before its projections; empty unless convolutional.
        statistics: `TeacherStatistics`, empty without standardization.

    Raises:
        InputError, ConfigurationError: For shapes that are no layers, and settings that do not fit together.
    """

    default_weight: float = IMAGE_DEFAULTS.feature_weight
    compares_both_sides: ClassVar[bool] = True
    query: nn.ModuleList
    key: nn.ModuleList
    projection: nn.ModuleList
    decoder: nn.ModuleList

    def __init__(
        self,
        student_shapes: Sequence[Shape],
        teacher_shapes: Sequence[Shape],
        *,
        association: AssociationName | Association = "similarity",
        target_norm: TargetNorm = "channel",
        projector: Projector = "shared",
        association_temperature: float | None = None,
        batch_size: int | None = None,
        association_bank: int = 0,
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
        self.projector: Projector = projector
        self.projection_init: ProjectionInit = projection_init or "random"
        self.relation_weight, self.max_grid = relation_weight, max_grid
        check_projection_init(projector, self.projection_init)
        _check_spared(spared_layers, len(self.student_specs), projector, association)
        standardized = self.teacher_specs if target_norm == "channel" else []
        self.statistics = TeacherStatistics([spec.channels for spec in standardized])
        compared = len(self.student_specs) - spared_layers
        self.comparison = self._make_comparison(tokens_aligned, compared, layers_per_projection)
        if not isinstance(association, Association):
            sizes = batch_size, association_bank
            association = self._make_association(association, target_norm, association_temperature, *sizes)
        self.association = association
        networks = {**self.association.networks, **self.comparison.networks}
        for name in NETWORKS:
            self.add_module(name, networks.get(name, nn.ModuleList()))
        self.upper_bound = self.association.upper_bound
        self.required_batch_size = self.association.required_batch_size
        whole = self.comparison.keeps_whole
        self.selection = TeacherSelection(
            self.teacher_specs,
            [] if whole else self.comparison.alignments,
            "whole" if whole else self.association.needs,
            max_tokens,
            max_grid,
            relations=relation_weight > 0,
        )
        self.kept, self.samples_tokens = self.selection.describe(), self.selection.samples_tokens

    @classmethod
    def published(
        cls, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape], batch_size: int
    ) -> SemCKDLoss:
        """Return the paper's loss: learned weights on raw similarity rows, raw targets, a projection for every pair.

        Shapes are without the batch dimension; the loss takes batches of `batch_size` only.
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
        """Return the loss for the layers that a trainer found; see `FeatureLoss.for_layers`."""
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
            association_temperature=association_temperature(options, defaults),
            batch_size=options.batch_size,
            association_bank=options.association_bank,
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

    def compare(
        self, student_features: Sequence[Tensor], targets: TeacherTargets, student_mask: LayerMasks
    ) -> FeatureLossOutput:
        """Return the loss of a batch; in the published form `RaggedBatchError` for one of another size."""
        if self.training:
            if len(self.statistics) and self.collecting:
                self.update_statistics(targets)
            if self.automatic_synchronization:
                self.synchronize()
        student, teacher = self.align(student_features, targets, student_mask)
        alpha = self.association.weights(student, teacher)
        weighted, errors = self.comparison.errors(student, teacher, alpha)
        layers, taught = len(self.student_specs), self.association.taught
        per_sample = weighted.sum(1) / taught(self.compared)
        if self.relation_weight > 0:
            own = [student.embedding(s) for s in range(layers)]
            theirs = [teacher.embedding(t) for t in range(len(self.teacher_specs))]
            smallest = smallest_length(student_features[0].dtype)
            relations = weighted_relation_error(own, theirs, alpha, smallest).sum(1)
            per_sample = per_sample + self.relation_weight * relations / taught(layers)
        penalty = self.association.penalty(alpha[:, : self.compared])
        if penalty is not None:
            per_sample = per_sample + penalty
        if self.compared < layers:
            errors = F.pad(errors, (0, 0, 0, layers - self.compared), value=math.nan)
        return FeatureLossOutput(per_sample.mean(), per_sample, alpha.detach(), errors.detach())

    def align(
        self, features: Sequence[Tensor], targets: TeacherTargets, mask: LayerMasks
    ) -> tuple[AlignedStudent, AlignedTeacher]:
        """Return both models' features as they are compared; the arguments are those of `compare`."""
        teacher = AlignedTeacher(targets, self.teacher_specs, self.statistics.layers)
        gridded = [
            not self.comparison.keeps_whole and any(pair.kind == "grid" for pair in row)
            for row in self.comparison.alignments
        ]
        decoders = list(self.comparison.decoder)
        return AlignedStudent(features, self.student_specs, mask, teacher, self.max_grid, gridded, decoders), teacher

    @property
    def compared(self) -> int:
        """Number of student layers that are projected and compared."""
        return self.comparison.compared

    @property
    def needs_statistics(self) -> bool:
        """Whether teacher statistics are needed and none were collected yet."""
        return self.statistics.missing

    @property
    def settings(self) -> dict[str, Any]:
        """Values in use of the fields whose defaults depend on the models."""
        return {
            "association": self.association.name,
            "association_temperature": self.association.temperature,
            "relation_weight": self.relation_weight,
            "projector": self.projector,
            "projection_init": self.projection_init,
            "max_grid": self.max_grid or 0,
        }

    def select(
        self, features: Sequence[Tensor], mask: LayerMasks = None, phase: Tensor | None = None
    ) -> TeacherTargets:
        """Return what is compared of the teacher's features, and what it is weighted by; see `TeacherSelection`."""
        return self.selection(features, mask, phase)

    def update_statistics(
        self, teacher_features: Sequence[Tensor] | TeacherTargets, teacher_mask: LayerMasks = None
    ) -> None:
        """Collect teacher statistics without computing a loss."""
        layers = self.statistics.layers
        if layers:
            teacher = AlignedTeacher(self.targets(teacher_features, teacher_mask), self.teacher_specs)
            values, masks = zip(*(teacher.values(t) for t in range(len(layers))), strict=True)
            update_layer_statistics(layers, values, masks)

    def forget_collected(self) -> None:
        """Forget what was collected since the last `synchronize`; see `FeatureLoss.forget_collected`."""
        for layer in self.statistics.layers:
            layer.collected = None
        self.association.forget_collected()

    def synchronize(
        self, reduce_sum: Callable[[Tensor], Tensor] | None = None, *, rank: int = 0, world: int = 1
    ) -> None:
        """Merge the statistics and the samples collected since the last call; see `FeatureLoss.synchronize`."""
        self.statistics.synchronize(reduce_sum)
        self.association.synchronize(reduce_sum, rank, world)

    def _make_comparison(self, tokens_aligned: bool, compared: int, shared: int) -> Comparison:
        alignments = [
            [Alignment.of(student, teacher, tokens_aligned) for teacher in self.teacher_specs]
            for student in self.student_specs
        ]
        if self.projector == "pairwise":
            return PairwiseComparison(self.student_specs, self.teacher_specs, alignments)
        return SharedComparison(
            self.student_specs,
            self.teacher_specs,
            alignments,
            compared=compared,
            decoded=self.projector == "convolutional",
            layers_per_projection=shared,
            start=self.projection_init,
        )

    def _make_association(
        self,
        name: AssociationName,
        target_norm: TargetNorm,
        temperature: float | None,
        batch_size: int | None,
        bank_size: int,
    ) -> Association:
        if temperature is None:
            temperature = association_temperature(LossOptions(association=name, target_norm=target_norm))
        if name == "similarity" or name == "sinkhorn":
            widths = [summary_width(spec) for spec in (*self.student_specs, *self.teacher_specs)]
            bank = SimilarityBank(bank_size, widths) if bank_size else None
            return (SinkhornAssociation if name == "sinkhorn" else SimilarityAssociation)(temperature, bank)
        if name != "learned":
            return FixedAssociation(name, temperature)
        students, teachers = self.student_specs[: self.compared], self.teacher_specs
        if target_norm == "channel":
            own, theirs = ([spec.channels for spec in specs] for specs in (students, teachers))
            return LearnedAssociation(own, theirs, temperature)
        return PublishedAssociation(len(students), len(teachers), batch_size, temperature)


def _check_spared(spared: int, layers: int, projector: Projector, association: AssociationName | Association) -> None:
    most = 0 if projector == "pairwise" or association == "last" else layers - 1
    if not 0 <= spared <= most:
        raise ConfigurationError(
            "So many student layers cannot be spared",
            received=f"spared_layers={spared} of {layers} layers, projector={projector!r}, "
            f"association={association!r}",
            expected=f"a number from 0 to {most}",
            todo=f"spare at most {most}",
        )
