"""The configuration: every `TrainingArguments` field plus those of the distillation, validated on creation."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from .choices import (
    Association,
    CacheDtype,
    ProjectionInit,
    Projector,
    TargetNorm,
    TeacherDtype,
    TeacherPlacement,
    check_projection_init,
    folder_name,
    layer_list,
    positive_list,
    require_value,
)
from .errors import ConfigurationError

# New projections learn from nothing, a pretrained student does not: a fine-tuning rate would leave them random.
MINIMUM_PROJECTION_LEARNING_RATE = 1e-3


def option(default: Any, help: str) -> Any:
    """Return a field with a default and its help, which stands nowhere else."""
    return field(default=default, metadata={"help": help})


@dataclass
class SemCKDConfig(TrainingArguments):
    """Arguments of `SemCKDTrainer` and `DistillationTrainer`.

    Takes every field of `transformers.TrainingArguments` and the ones below; can be parsed from a command line with
    `transformers.HfArgumentParser`, whose `--help` describes each field. A value, or a combination of values, that
    cannot work raises `ConfigurationError`.
    """

    temperature: float | None = option(
        None,
        "Temperature of the logit distillation, > 0; divides the logits of both models. None: 1 for language models "
        "(causal and sequence to sequence), whose vocabulary a higher one drowns in tokens that nobody would write; 4 "
        "elsewhere.",
    )
    task_weight: float = option(1.0, "Weight of the task loss, >= 0. With 0 no labels are needed.")
    logit_weight: float = option(1.0, "Weight of the logit distillation (Hinton et al., 2015), >= 0. 0: off.")
    logit_chunk_size: int | None = option(
        None,
        "Positions whose logits a causal language model computes at once for its losses, which stay the same: all of "
        "a large vocabulary take more memory than the models. 0: all. None: as many as make 8 million logits, from "
        "4,096 token ids on. All logits are also computed at once where the output layer is not a plain linear layer, "
        "where the model's loss is more than the cross-entropy of the next tokens, and with several teachers, a "
        "teacher cache, label smoothing, a loss function of your own, torch.compile, FSDP or DeepSpeed; a log line "
        "says why.",
    )
    feature_weight: float | None = option(
        None,
        "Weight of the feature distillation, >= 0. 0: off. None: the published weight for a baseline; for SemCKD 100 "
        "between CNNs and 3 elsewhere (text may gain from 10; a short training at a low learning rate needs less). "
        "SemCKD's published form needs 50 to 400.",
    )
    association: Association | None = option(
        None,
        "How teacher layers are weighted for each student layer and sample. similarity: by how similarly both layers "
        "place the sample among others (see association_bank). sinkhorn: the same, balanced by Sinkhorn iterations, "
        "so that student layers do not all take the same teacher layer. learned: by small networks trained with the "
        "student. uniform, last, one_to_one: fixed controls (equal weights; last layer to last layer; a uniform layer "
        "map). None: sinkhorn between CNNs, similarity elsewhere.",
    )
    relation_weight: float | None = option(
        None,
        "Weight, >= 0, of the relation error within the feature term: the difference between both layers' distances "
        "from a sample to the others of the micro-batch. 0: features alone, as published. None: 20 between image "
        "models of which at least one is a transformer, 0 elsewhere (it did not help between CNNs and hurt on text).",
    )
    target_norm: TargetNorm = option(
        "channel",
        "channel: standardize every teacher channel by its running mean and variance over the training data. none: "
        "raw targets, as published.",
    )
    projector: Projector | None = option(
        None,
        "shared: one linear projection per student layer and teacher width. convolutional: the same after two "
        "convolutions per student layer, for feature maps. pairwise: the published convolutional projection for "
        "every pair of layers (several times slower). None: convolutional between CNNs, shared elsewhere.",
    )
    projection_init: ProjectionInit | None = option(
        None,
        "Initialization of linear projections. zero: no gradient reaches the student until its projection has "
        "learned. random: as new layers. None: zero where a layer has no pixel grid, as on text; random elsewhere "
        "(between ViTs it made no difference). The pairwise projector is always random.",
    )
    student_layers: list[str] | None = option(
        None,
        "Student layers to train: hidden-state indices (0 is the embedding or stem) or module names. None: all blocks "
        "(between CNNs, the last one is left to the logits).",
    )
    teacher_layers: list[str] | None = option(
        None,
        "Teacher layers to learn from, given like student_layers. None: all blocks. They are those of each of several "
        "teachers, unless all names are like teachers.0.encoder.layer.3.",
    )
    teacher_weights: list[float] | None = option(
        None,
        "How much each of several teachers counts, > 0, in the means of their probabilities and their feature losses; "
        "divided by the sum. None: all the same.",
    )
    teacher_dtype: TeacherDtype = option(
        "auto",
        "Precision of the teacher's weights. auto: as given or saved. float32, bfloat16, float16: loaded in it; a "
        "model object with another one is copied. With bf16 or fp16 it still runs in the student's mixed precision. "
        "8bit, 4bit: quantized by bitsandbytes, all but its head.",
    )
    teacher_placement: TeacherPlacement = option(
        "device",
        "Where the teacher's weights are. device: whole on each process's device. device_map: divided among all "
        "devices of the process, and the host. shard: divided among the processes (FSDP2), a block together while it "
        "runs. offload: in the host's memory, a layer on the device while it runs. A teacher that is quantized, "
        "spread by device_map or sharded already stays where it is; leave teacher_placement out for it, any other "
        "value is refused.",
    )
    teacher_compile: bool = option(
        False,
        "Run the teacher under torch.compile, or eagerly where that fails. Pays off in long trainings on a GPU.",
    )
    association_temperature: float | None = option(
        None,
        "Temperature of the association, > 0; smaller is sharper. similarity, sinkhorn: of a softmax over cosines. "
        "learned: weights tend to softmax(-error / temperature), so they cannot collapse. None: 0.2 (0.02 between "
        "CNNs, where half precision may change single weights), 0.5 (learned), or 1 in the published form.",
    )
    association_bank: int = option(
        64,
        "similarity, sinkhorn: take similarities to this many recent samples, which change once a step: the "
        "association depends neither on the size of micro-batches nor on processes. 0: to the other samples of the "
        "micro-batch.",
    )
    max_tokens: int = option(
        16,
        "Compare at most this many tokens of a sample, evenly spaced and the same ones every epoch. 0: no limit. "
        "Ignored by the pairwise projector.",
    )
    max_grid: int | None = option(
        None,
        "Pool feature maps to at most this many rows and columns before they are compared. 0: no limit, which takes "
        "much memory between CNNs. None: 8 between CNNs, 4 elsewhere. Ignored by the pairwise projector.",
    )
    projection_learning_rate: float | None = option(
        None,
        "Peak learning rate of the projections and association networks, > 0; follows the student's schedule. None: "
        "the larger of learning_rate and 0.001.",
    )
    teacher_cache_dir: str | None = option(
        None,
        "Folder for teacher outputs, keyed by the sample's content and the teacher, so that the teacher runs once per "
        "sample, across epochs and runs. None: no cache.",
    )
    teacher_cache_dtype: CacheDtype = option(
        "auto",
        "Precision of cached features (logits keep theirs). auto: the teacher's own, so that a cached run equals a "
        "live one. float16, bfloat16: half the space of float32.",
    )
    teacher_cache_samples: int | None = option(
        None,
        "Token ids drawn from the teacher's distribution at each position, and cached in place of a causal language "
        "model's logits: an unbiased estimate of the same loss, in a fraction of the space. 0: whole logits, for the "
        "losses of a run without a cache. None: 32, which take 100 bytes or less, where half-precision logits would "
        "take more than 120; whole ones for a smaller vocabulary, several teachers and any other model.",
    )
    teacher_cache_limit_gb: float | None = option(
        None,
        "Largest size of one teacher's cache in gigabytes (2^30 bytes), > 0. A dataset that will not fit is refused "
        "before training. None: what the disk can spare.",
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
        `arguments` are any other fields and win over the published values.
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
    def of(cls, args: TrainingArguments | Mapping[str, Any] | None) -> SemCKDConfig:
        """Return the arguments as a configuration; for None, with the output folder that `Trainer` would use."""
        if args is None or isinstance(args, Mapping):
            return cls(**{"output_dir": "tmp_trainer", **(args or {})})
        if getattr(args, "predict_with_generate", False):
            raise ConfigurationError(
                "`predict_with_generate` would be ignored: this is no Seq2SeqTrainer",
                received="predict_with_generate=True",
                expected="evaluation by the loss and the logits",
                todo="set it to False, and evaluate with Seq2SeqTrainer(model=trainer.student, ...) afterwards",
            )
        return args if isinstance(args, SemCKDConfig) else cls.from_training_arguments(args)

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
    def distills_logits(self) -> bool:
        """Whether the logit term is on."""
        return self.logit_weight > 0

    @property
    def distills_features(self) -> bool:
        """Whether the feature term is on."""
        return self.feature_weight is None or self.feature_weight > 0

    @property
    def distills(self) -> bool:
        """Whether any distillation term is on; without one the trainer is `Trainer`."""
        return self.distills_logits or self.distills_features

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
        """Return the precision of the teacher's weights, or None where it is its own, or quantized."""
        return getattr(torch, self.teacher_dtype, None)

    @property
    def teacher_bits(self) -> int | None:
        """Bits of the teacher's weights that `teacher_dtype` quantizes; None where it does not."""
        return {"8bit": 8, "4bit": 4}.get(self.teacher_dtype)

    def resolved_cache_dtype(self) -> torch.dtype | None:
        """Return the precision of cached features, or None for the teacher's own."""
        return None if self.teacher_cache_dtype == "auto" else getattr(torch, self.teacher_cache_dtype)

    def distillation_settings(self) -> dict[str, Any]:
        """Return the distillation's fields, ready for JSON and without paths; None where the models decide."""
        settings = {name: getattr(self, name) for name in distillation_fields() if name != "teacher_cache_dir"}
        settings["projection_learning_rate"] = self.resolved_projection_learning_rate()
        return settings

    def validate_distillation(self) -> None:
        """Check the distillation's values and combinations again, after fields were set by hand."""
        self._validate_values()
        self._validate_combinations()

    def _validate_values(self) -> None:
        for name in distillation_fields():
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            if value is None and default is None:
                continue
            require_value(name, value, default)
        self.student_layers = layer_list("student_layers", self.student_layers)
        self.teacher_layers = layer_list("teacher_layers", self.teacher_layers)
        self.teacher_weights = positive_list("teacher_weights", self.teacher_weights)
        if self.teacher_cache_dir is not None:
            self.teacher_cache_dir = folder_name("teacher_cache_dir", self.teacher_cache_dir)

    def _validate_combinations(self) -> None:
        if self.use_liger_kernel and self.distills_logits:
            raise ConfigurationError(
                "`use_liger_kernel` and logit distillation exclude each other: the fused kernel returns no logits",
                received=f"use_liger_kernel=True, logit_weight={self.logit_weight}",
                expected="one of the two",
                todo="set use_liger_kernel=False, or logit_weight=0 to distill features alone",
            )
        if not self.distills and self.task_weight != 1:
            raise ConfigurationError(
                "`task_weight` has no effect where nothing else is minimized",
                received=f"task_weight={self.task_weight}, logit_weight=0, feature_weight=0",
                expected="task_weight=1, or a distillation term",
                todo="set task_weight=1, or logit_weight or feature_weight to a positive number",
            )
        check_projection_init(self.projector, self.projection_init)
        if self.auto_find_batch_size and self.depends_on_batch_size:
            raise ConfigurationError(
                "`auto_find_batch_size` changes the batch size, which the published association is built for",
                received="auto_find_batch_size=True, association='learned', target_norm='none'",
                expected="one of the two",
                todo="set auto_find_batch_size=False, or target_norm='channel', whose association takes any batch",
            )
        if self.label_smoothing_factor and not self.task_weight and self.distills:
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


def _described(described: str) -> str:
    """Return the docstring with the help of the fields, which stands at the fields alone."""
    own = (SemCKDConfig.__dataclass_fields__[name] for name in distillation_fields())
    texts = (f"{' ' * 8}{entry.name} ({entry.type}, {entry.default!r}): {entry.metadata['help']}" for entry in own)
    wrapped = (textwrap.fill(text, 115, subsequent_indent=" " * 12, break_on_hyphens=False) for text in texts)
    return "\n".join([described.rstrip(), "", "    Attributes:", *wrapped, "    "])


if SemCKDConfig.__doc__:  # python -OO leaves none
    SemCKDConfig.__doc__ = _described(SemCKDConfig.__doc__)
