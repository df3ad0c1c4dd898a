"""The configuration: every `TrainingArguments` field plus those of the distillation, validated on creation."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, get_args

import torch
from transformers import TrainingArguments

from .choices import (
    Association,
    CacheDtype,
    ProjectionInit,
    Projector,
    TargetNorm,
    TeacherDtype,
    check_projection_init,
)
from .errors import ConfigurationError, nearest

# New projections learn from nothing, a pretrained student does not: a fine-tuning rate would leave them random.
MINIMUM_PROJECTION_LEARNING_RATE = 1e-3


@dataclass
class SemCKDConfig(TrainingArguments):
    """Arguments of `SemCKDTrainer` and `DistillationTrainer`.

    Takes every field of `transformers.TrainingArguments` and the ones below; can be parsed from a command line with
    `transformers.HfArgumentParser`. The help of each field is in its metadata, and shown by `--help`.

    Raises:
        ConfigurationError: For a value, or a combination of values, that cannot work.
    """

    temperature: float = field(
        default=4.0,
        metadata={"help": "Temperature of the logit distillation, > 0. Both distributions are softened by it."},
    )
    task_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the task loss (the labels), >= 0. With 0 the labels are not needed."},
    )
    logit_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the logit distillation (Hinton et al., 2015), >= 0. With 0 it is not computed."},
    )
    feature_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the feature distillation, >= 0. With 0 it is not computed. None: what suits the loss, "
            "the published weight for a baseline; for SemCKD 100 between CNNs, 3 elsewhere (text may "
            "want 10; very few steps at a low learning rate less). SemCKD's published form needs 50 to 400."
        },
    )
    association: Association | None = field(
        default=None,
        metadata={
            "help": "How teacher layers are weighed for each student layer and sample. similarity: by how alike both "
            "see the sample among the batch. sinkhorn: the same, but a teacher layer is shared out: student layers "
            "that want the same one get others as well. learned: by small networks, trained with the student. "
            "uniform, last, one_to_one: fixed controls (equal weights; last layer to last layer; a uniform skip "
            "map). None: sinkhorn between CNNs, similarity elsewhere."
        },
    )
    relation_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight, >= 0, of the relation error within the feature term: how differently both layers place a "
            "sample among the others of the micro-batch. None: 20 between image models where one is a transformer, 0 "
            "elsewhere (between CNNs it added nothing, and on text it did harm). 0: as published, features alone."
        },
    )
    target_norm: TargetNorm = field(
        default="channel",
        metadata={
            "help": "channel: every teacher channel is standardized with its running mean and variance over "
            "the training data. none: raw targets, as published."
        },
    )
    projector: Projector | None = field(
        default=None,
        metadata={
            "help": "shared: one linear projection per student layer and teacher width. convolutional: the same "
            "behind two convolutions per student layer, for maps. pairwise: the published convolutional projection "
            "for every pair of layers (several times slower). None: convolutional between CNNs, shared elsewhere."
        },
    )
    projection_init: ProjectionInit | None = field(
        default=None,
        metadata={
            "help": "How linear projections start. zero: at zero, so that a student is pushed nowhere until its "
            "projection reads something in it. random: as new layers do. None: zero where a layer lies on no grid "
            "of pixels, as on text; random elsewhere (it made no difference between ViTs). Zero not with the pairwise "
            "projector."
        },
    )
    student_layers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Student layers to train: hidden-state indices (0 is the embedding or stem) or module "
            "names. None: all blocks, found automatically (between CNNs, the last one is left to the logits)."
        },
    )
    teacher_layers: list[str] | None = field(
        default=None,
        metadata={"help": "Teacher layers to learn from, given like student_layers. None: all blocks."},
    )
    teacher_dtype: TeacherDtype = field(
        default="auto",
        metadata={
            "help": "Precision of the teacher. auto: as it was given, or saved. float32, bfloat16, float16: it is "
            "loaded in it, or copied when it is a model object of another precision. With bf16 or fp16 it computes "
            "in the student's mixed precision all the same."
        },
    )
    teacher_compile: bool = field(
        default=False,
        metadata={
            "help": "Run the teacher under torch.compile, and without it where that fails. Pays off in long "
            "trainings on a GPU."
        },
    )
    association_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Temperature of the association, > 0; smaller is sharper. similarity: of a softmax over cosines. "
            "learned: weights tend to softmax(-error / temperature), so they cannot collapse. None: 0.2 (similarity; "
            "0.02 between CNNs, where half precision may turn single weights), 0.5 (learned), or 1 in the published "
            "form."
        },
    )
    max_tokens: int = field(
        default=16,
        metadata={
            "help": "At most this many tokens of a sample are compared, at even distances and the same ones whenever "
            "the sample comes. 0: no limit. Not with the pairwise projector."
        },
    )
    max_grid: int | None = field(
        default=None,
        metadata={
            "help": "Feature maps are pooled to at most this many rows and columns before they are compared. 0: no "
            "limit, which between CNNs takes memory. None: 8 between CNNs, 4 elsewhere. Not with the pairwise "
            "projector."
        },
    )
    projection_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of the projections and association networks, > 0; follows the student's "
            "schedule. None: the larger of learning_rate and 0.001."
        },
    )
    teacher_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which teacher outputs are kept, keyed by the sample's content and the teacher, so that "
            "later epochs and runs skip the teacher. None: no cache."
        },
    )
    teacher_cache_dtype: CacheDtype = field(
        default="auto",
        metadata={
            "help": "Precision of the cached teacher features (logits keep theirs). auto: the teacher's own, so that "
            "a cached run equals a live one. float16, bfloat16: half the space of float32."
        },
    )
    teacher_cache_limit_gb: float | None = field(
        default=None,
        metadata={
            "help": "Most gigabytes (2^30 bytes) that the cache of one teacher may take, > 0. A dataset that will not "
            "fit is refused before training. None: whatever the disk can spare."
        },
    )

    def __post_init__(self) -> None:
        """Validate the distillation fields, then everything that `TrainingArguments` checks."""
        self._validate_values()
        super().__post_init__()
        self._validate_combinations()

    @classmethod
    def published(cls, output_dir: str | None = None, **arguments: Any) -> SemCKDConfig:
        """Return the configuration of the paper: learned weights, raw targets, a projection for every pair.

        Temperature 4, weights 1 (task), 1 (logits) and 400 (features; CIFAR-100 in the paper, 50 on ImageNet), and an
        association temperature of 1. The association networks take similarity rows, so every batch must have
        `per_device_train_batch_size` samples: set `dataloader_drop_last=True` or let the dataset be divisible.

        Args:
            output_dir: As in `TrainingArguments`.
            arguments: Any other field; what is given here wins over the published value.
        """
        settings: dict[str, Any] = {
            "association": "learned",
            "target_norm": "none",
            "projector": "pairwise",
            "relation_weight": 0.0,
            "temperature": 4.0,
            "task_weight": 1.0,
            "logit_weight": 1.0,
            "feature_weight": 400.0,
            "association_temperature": 1.0,
        }
        return cls(output_dir=output_dir, **{**settings, **arguments})

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments) -> SemCKDConfig:
        """Return a configuration with the values of plain training arguments and the distillation's defaults.

        The given object is not changed, and its derived values (devices, integrations) are kept as they are.
        """
        converted = copy.copy(args)
        converted.__class__ = cls
        for name in distillation_fields():
            setattr(converted, name, cls.__dataclass_fields__[name].default)
        converted._validate_combinations()
        return converted

    @property
    def distils_logits(self) -> bool:
        """Whether the logit term is on."""
        return self.logit_weight > 0

    @property
    def distils_features(self) -> bool:
        """Whether the feature term is on."""
        return self.feature_weight is None or self.feature_weight > 0

    @property
    def distils(self) -> bool:
        """Whether any distillation term is on; without one the trainer is `Trainer`."""
        return self.distils_logits or self.distils_features

    @property
    def depends_on_batch_size(self) -> bool:
        """Whether the association networks take whole similarity rows, as published, and so fix the batch size."""
        return self.association == "learned" and self.target_norm == "none"

    def resolved_projection_learning_rate(self) -> float:
        """Return the peak learning rate of projections and association networks."""
        if self.projection_learning_rate is not None:
            return self.projection_learning_rate
        return max(self.learning_rate, MINIMUM_PROJECTION_LEARNING_RATE)

    def resolved_teacher_dtype(self) -> torch.dtype | None:
        """Return the precision that the teacher is wanted in; None leaves it as it is."""
        return None if self.teacher_dtype == "auto" else getattr(torch, self.teacher_dtype)

    def resolved_cache_dtype(self) -> torch.dtype | None:
        """Return the precision of cached features, or None for the teacher's own."""
        return None if self.teacher_cache_dtype == "auto" else getattr(torch, self.teacher_cache_dtype)

    def distillation_settings(self) -> dict[str, Any]:
        """Return what was asked of the distillation, ready for JSON, without paths: for the record and the card.

        What depends on the models is None where it was left open; a trainer knows it.
        """
        settings = {name: getattr(self, name) for name in distillation_fields() if name != "teacher_cache_dir"}
        settings["projection_learning_rate"] = self.resolved_projection_learning_rate()
        return settings

    def validate_distillation(self) -> None:
        """Check the distillation's values and combinations again, after fields were set by hand.

        Raises:
            ConfigurationError: For a value, or a combination of values, that cannot work.
        """
        self._validate_values()
        self._validate_combinations()

    def _validate_values(self) -> None:
        for name in ("task_weight", "logit_weight", "feature_weight", "relation_weight"):
            optional = name in ("feature_weight", "relation_weight")
            if not (optional and getattr(self, name) is None):
                _require_number(name, getattr(self, name), minimum=0.0, strict=False)
        _require_number("temperature", self.temperature, minimum=0.0, strict=True)
        for name in ("association_temperature", "projection_learning_rate", "teacher_cache_limit_gb"):
            if getattr(self, name) is not None:
                _require_number(name, getattr(self, name), minimum=0.0, strict=True)
        self._validate_sampling()
        _require_choice("target_norm", self.target_norm, get_args(TargetNorm))
        for name, choices in (
            ("association", get_args(Association)),
            ("projector", get_args(Projector)),
            ("projection_init", get_args(ProjectionInit)),
        ):
            if getattr(self, name) is not None:
                _require_choice(name, getattr(self, name), choices)
        _require_choice("teacher_cache_dtype", self.teacher_cache_dtype, get_args(CacheDtype))
        _require_choice("teacher_dtype", self.teacher_dtype, get_args(TeacherDtype))
        self.student_layers = _layer_list("student_layers", self.student_layers)
        self.teacher_layers = _layer_list("teacher_layers", self.teacher_layers)
        if self.teacher_cache_dir is not None and not str(self.teacher_cache_dir).strip():
            raise ConfigurationError(
                "`teacher_cache_dir` is empty",
                received=repr(self.teacher_cache_dir),
                expected="a folder, or None for no cache",
                todo="name a folder that can be written",
            )

    def _validate_sampling(self) -> None:
        for name, default in (("max_tokens", 16), ("max_grid", None)):
            limit = getattr(self, name)
            if limit is None and default is None:
                continue
            if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
                raise ConfigurationError(
                    f"`{name}` is not a number of {'tokens' if name == 'max_tokens' else 'rows and columns'}",
                    received=repr(limit),
                    expected="a whole number >= 1, or 0 for no limit",
                    todo=f"set {name} to {default}, or to 0 to compare everything",
                )

    def _validate_combinations(self) -> None:
        if self.use_liger_kernel and self.distils_logits:
            raise ConfigurationError(
                "`use_liger_kernel` and logit distillation exclude each other: the fused kernel returns no logits",
                received=f"use_liger_kernel=True, logit_weight={self.logit_weight}",
                expected="one of the two",
                todo="set use_liger_kernel=False, or logit_weight=0 to distil features alone",
            )
        check_projection_init(self.projector, self.projection_init)
        if self.auto_find_batch_size and self.depends_on_batch_size:
            raise ConfigurationError(
                "`auto_find_batch_size` changes the batch size, which the published association is built for",
                received="auto_find_batch_size=True, association='learned', target_norm='none'",
                expected="one of the two",
                todo="set auto_find_batch_size=False, or target_norm='channel', whose association takes any batch",
            )
        if self.label_smoothing_factor and not self.task_weight and self.distils:
            raise ConfigurationError(
                "`label_smoothing_factor` has no effect without a task loss",
                received=f"label_smoothing_factor={self.label_smoothing_factor}, task_weight=0",
                expected="task_weight > 0, or no label smoothing",
                todo="set label_smoothing_factor=0, or task_weight to a positive number",
            )


def distillation_fields() -> tuple[str, ...]:
    """Return the names of the fields that `SemCKDConfig` adds to `TrainingArguments`, in order."""
    inherited = {entry.name for entry in fields(TrainingArguments)}
    return tuple(entry.name for entry in fields(SemCKDConfig) if entry.name not in inherited)


def _require_number(name: str, value: object, *, minimum: float, strict: bool) -> None:
    expected = f"a finite number {'>' if strict else '>='} {minimum:g}"
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if number and (value > minimum or (not strict and value == minimum)):  # type: ignore[operator]
        return
    raise ConfigurationError(
        f"`{name}` is out of range", received=repr(value), expected=expected, todo=f"set {name} to {expected}"
    )


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    close = nearest(str(value), choices, count=1)
    raise ConfigurationError(
        f"`{name}` is not one of the known values",
        received=repr(value),
        expected=", ".join(map(repr, choices)),
        todo=f"did you mean {close[0]!r}?" if close else f"set {name} to one of these",
    )


def _layer_list(name: str, layers: Any) -> list[Any] | None:
    """Return layers as all-int or all-str; digits from a command line become ints."""
    if layers is None:
        return None
    listed = list(layers) if isinstance(layers, (list, tuple)) else [layers]
    listed = [int(layer) if isinstance(layer, str) and re.fullmatch("-?[0-9]+", layer) else layer for layer in listed]
    kinds = {type(layer) for layer in listed}
    if kinds in ({int}, {str}) and len(set(listed)) == len(listed):
        return listed
    raise ConfigurationError(
        f"`{name}` is not a list of layers",
        received=repr(layers),
        expected="different hidden-state indices (ints), or different module names (strings), at least one; or None",
        todo=f"leave {name} out to use all blocks, or list either indices or names",
    )
