"""Refuses what cannot work before the first step, and finds out what the layers look like."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .config import SemCKDConfig
from .errors import ConfigurationError, InputError, SemCKDError, message
from .features import FeatureCapture, FeatureSpec, describe
from .losses import FeatureLoss
from .modeling import logits_of
from .teacher import LABEL_COLUMNS, TEACHER_PREFIX, Teacher, TeacherOutputs, forward_parameters, select_inputs
from .terms import logit_shape_message

logger = logging.getLogger(__name__)

PROBE_SAMPLES = 2
FEATURE_LOSSES = ("semckd",)


@dataclass(frozen=True)
class Probe:
    """What one small batch through both models tells.

    Attributes:
        student_logits: The student's logits, or None when it returns none.
        student_specs: The student's chosen layers; empty when features are not distilled.
        teacher_specs: The teacher's chosen layers.
        student_features: What the student's layers gave.
        teacher_features: What the teacher's layers gave.
        tokens_aligned: Whether position n of both models stands for the same input.
    """

    student_logits: Tensor | None
    student_specs: list[FeatureSpec]
    teacher_specs: list[FeatureSpec]
    student_features: list[Tensor]
    teacher_features: list[Tensor]
    tokens_aligned: bool


def check_models(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that is the student, wholly or in part: freezing it would freeze the student.

    Raises:
        InputError: When they share an object or a parameter.
    """
    own = {id(parameter) for parameter in student.parameters()}
    shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in own]
    if teacher is student or shared:
        raise InputError(
            message(
                "Teacher and student are the same object"
                if teacher is student
                else "Teacher and student share parameters",
                received=f"{type(teacher).__name__}" + (f" sharing {', '.join(shared[:3])}" if shared else ""),
                expected="two models that share nothing",
                todo="use copy.deepcopy(student) for self-distillation, or load the teacher separately",
            )
        )


def check_teacher_given(teacher: object, config: SemCKDConfig) -> None:
    """Refuse to distil without a teacher.

    Raises:
        InputError: When there is none.
    """
    if teacher is None:
        raise InputError(
            message(
                "There is no teacher to distil from",
                received=f"teacher_model=None, logit_weight={config.logit_weight}, "
                f"feature_weight={config.feature_weight}",
                expected="a model, or a name or folder to load one from",
                todo="pass teacher_model=..., or set logit_weight=0 and feature_weight=0 for plain fine-tuning",
            )
        )


def check_parallelism(config: SemCKDConfig) -> None:
    """Refuse torch's DataParallel, whose replicas share no running statistics and lose gradients of the projections.

    Raises:
        InputError: When one process would drive several GPUs.
    """
    if config.n_gpu > 1:
        raise InputError(
            message(
                "One process would drive several GPUs (DataParallel), which distillation does not support",
                received=f"{config.n_gpu} GPUs in one process",
                expected="one process a GPU",
                todo="start with `accelerate launch script.py` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU",
            )
        )


def check_feature_loss(source: FeatureLoss | str | None) -> FeatureLoss | str | None:
    """Return what was given as feature loss if it can be one.

    Raises:
        ConfigurationError: For an unknown name or another type.
    """
    if source is None or isinstance(source, FeatureLoss) or source in FEATURE_LOSSES:
        return source
    raise ConfigurationError(
        message(
            "`feature_loss` is not a feature loss",
            received=repr(source),
            expected=f"None, a FeatureLoss, or one of {', '.join(map(repr, FEATURE_LOSSES))}",
            todo="pass one of these; hf_semckd.losses.FeatureLoss is the base class for your own",
        )
    )


def check_label_names(student: nn.Module, teacher: nn.Module) -> None:
    """Warn when both models name their labels and the names, or their order, differ."""
    names = [_label_names(model) for model in (student, teacher)]
    if all(names) and names[0] != names[1]:
        logger.warning(
            "Teacher and student name their labels differently: student %s, teacher %s. Logits are matched "
            "by position; give the student the teacher's id2label if the order differs.",
            names[0],
            names[1],
        )


def check_dataset(dataset: Any, models: Sequence[nn.Module], remove_unused_columns: bool) -> None:
    """Refuse an empty dataset, and one whose columns neither model takes.

    Raises:
        InputError: In both cases.
    """
    size = len(dataset) if hasattr(dataset, "__len__") else None
    if size == 0:
        raise InputError(
            message(
                "The training dataset is empty",
                received="0 samples",
                expected="at least 1",
                todo="check how it is made",
            )
        )
    columns = column_names(dataset)
    if not columns or not remove_unused_columns:
        return
    taken = {name for model in models for name in forward_parameters(model)} | set(LABEL_COLUMNS)
    useful = [name for name in columns if name in taken or name.startswith(TEACHER_PREFIX)]
    if not [name for name in useful if name not in LABEL_COLUMNS] and not any(
        _takes_anything(model) for model in models
    ):
        raise InputError(
            message(
                "Neither student nor teacher takes any column of the training dataset",
                received=f"columns {', '.join(map(repr, columns))}",
                expected=f"some of {', '.join(sorted(taken - set(LABEL_COLUMNS)))}",
                todo="tokenize or preprocess the dataset first (dataset.map(...)), or set "
                "remove_unused_columns=False when "
                "the collator or a transform makes the inputs",
            )
        )


def check_labels(batch: Mapping[str, Any], label_names: Sequence[str], config: SemCKDConfig) -> None:
    """Refuse a batch without labels while the task loss is on.

    Raises:
        InputError: When there are none.
    """
    if config.task_weight > 0 and not any(name in batch for name in (*label_names, "labels")):
        raise InputError(
            message(
                "There are no labels, and task_weight is positive",
                received=f"columns {', '.join(map(repr, batch))}, task_weight={config.task_weight}",
                expected=f"a column named {', '.join(map(repr, label_names or ('labels',)))}",
                todo="add labels, or set task_weight=0 to learn from the teacher alone",
            )
        )


def check_encoder_decoder(models: Sequence[nn.Module], config: SemCKDConfig) -> None:
    """Refuse the teacher cache for encoder-decoders, whose outputs follow the labels and not the inputs alone.

    Raises:
        ConfigurationError: When both are asked for.
    """
    found = [type(model).__name__ for model in models if _is_encoder_decoder(model)]
    if found and config.teacher_cache_dir is not None:
        raise ConfigurationError(
            message(
                "The teacher cache does not support encoder-decoder models",
                received=f"teacher_cache_dir with {', '.join(found)}",
                expected="an encoder or a decoder, or no cache",
                todo="leave teacher_cache_dir out",
            )
        )


def check_loss_fits(loss: FeatureLoss, found: Probe) -> None:
    """Try a feature loss that was given as an object on the probe's features.

    Raises:
        InputError: When it cannot take them.
    """
    shapes = [[tuple(x.shape[1:]) for x in features] for features in (found.student_features, found.teacher_features)]
    if loss.required_batch_size is not None and loss.required_batch_size != len(found.student_features[0]):
        return
    trial = copy.deepcopy(loss).eval().to(found.student_features[0].device, found.student_features[0].dtype)
    try:
        trial(found.student_features, found.teacher_features)
    except (SemCKDError, RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            message(
                "The feature loss was made for other layers than those that are chosen",
                received=f"student features {shapes[0]}, teacher features {shapes[1]}; the loss said: {error}",
                expected="a loss for these layers, in this order",
                todo="choose the layers with student_layers and teacher_layers, or make the loss for these shapes",
            )
        ) from error


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _check_decoder_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    if _is_encoder_decoder(model) and "decoder_input_ids" not in inputs:
        raise InputError(
            message(
                f"{type(model).__name__} has a decoder, and the batch holds nothing for it to start from",
                received=f"columns {', '.join(map(repr, inputs))}",
                expected="decoder_input_ids beside the labels",
                todo="use DataCollatorForSeq2Seq(tokenizer, model=student), which makes them from the labels",
            )
        )


def check_published_batches(config: SemCKDConfig, samples: int | None, processes: int) -> None:
    """Refuse, before training, a ragged last batch where the published equations demand a fixed batch size.

    Raises:
        InputError: When the last batch would be smaller than the others.
    """
    size = config.per_device_train_batch_size
    if samples is None or config.dataloader_drop_last or processes > 1 or samples % size == 0:
        return
    raise InputError(
        message(
            "The published association takes similarity rows, whose length is the batch size; the last batch "
            "is smaller",
            received=f"{samples} samples in batches of {size}, dataloader_drop_last=False",
            expected="every batch of the same size",
            todo="set dataloader_drop_last=True, pad the dataset to a multiple of the batch size, or use the default "
            "(calibrated) form, which takes any batch",
        )
    )


def column_names(dataset: Any) -> list[str]:
    """Return the names of a dataset's columns; one that does not tell them is asked for a sample."""
    names = getattr(dataset, "column_names", None)
    if names or dataset is None:
        return list(names or ())
    sample = next(iter(first_samples(dataset)), None)
    return list(sample) if isinstance(sample, Mapping) else []


def first_samples(dataset: Any) -> list[Any]:
    """Return the first samples of a map-style or iterable dataset."""
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return [dataset[index] for index in range(min(PROBE_SAMPLES, len(dataset)))]
    return list(islice(iter(dataset), PROBE_SAMPLES))


def collate(collator: Any, samples: list[Any]) -> Mapping[str, Any]:
    """Return the samples as a batch.

    Raises:
        InputError: When the collator cannot make one.
    """
    try:
        return collator(samples)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        columns = list(samples[0]) if samples and isinstance(samples[0], Mapping) else []
        paired = any(str(name).startswith(TEACHER_PREFIX) for name in columns)
        raise InputError(
            message(
                "The data collator cannot make a batch of the training samples",
                received=f"columns {', '.join(map(repr, columns)) or 'of unknown names'}; the collator said: {error}",
                expected="samples that it can stack or pad",
                todo="use hf_semckd.data.TeacherStudentCollator: each tokenizer then pads its own columns"
                if paired
                else "pass a data_collator that fits the samples, such as DataCollatorWithPadding(tokenizer)",
            )
        ) from error


@torch.no_grad()
def probe(
    student: nn.Module,
    student_capture: FeatureCapture,
    teacher: Teacher,
    batch: Mapping[str, Any],
    *,
    features: bool,
    logits: bool,
) -> Probe:
    """Run a small batch through both models in evaluation mode and check that they fit together.

    Raises:
        InputError: When a model cannot take the batch, or their logits differ in shape.
        LayerNotFoundError: When a chosen layer does not exist.
        TeacherOutputError: When the teacher's outputs are not finite.
    """
    _check_decoder_inputs(teacher.model, teacher.inputs(batch))
    teacher_outputs, teacher_recorded = _run(
        "teacher", batch, lambda: teacher.forward(teacher.inputs(batch), features=features)
    )
    student_inputs = select_inputs(student, batch)
    _check_decoder_inputs(student, student_inputs)
    was_training = student.training
    student.eval()
    try:
        student_outputs, student_features = _run(
            "student", batch, lambda: _capture_student(student, student_capture, student_inputs, features)
        )
    finally:
        student.train(was_training)
    teacher_features: list[Tensor] = []
    if features:
        teacher.capture.resolve(teacher.model, teacher_outputs)
        teacher_features = teacher.capture.collect(teacher_outputs, teacher_recorded)
    student_logits = _check_logits(student_outputs, teacher_outputs, logits)
    _check_teacher_values(teacher, teacher_outputs, teacher_features, batch, logits)
    return Probe(
        student_logits,
        [
            describe(x, n, student, student_inputs)
            for x, n in zip(student_features, student_capture.names(), strict=False)
        ],
        [
            describe(x, n, teacher.model, teacher.inputs(batch))
            for x, n in zip(teacher_features, teacher.capture.names(), strict=False)
        ],
        student_features,
        teacher_features,
        not teacher.has_own_tokens(batch),
    )


@contextmanager
def untouched_random_state(seed: int) -> Iterator[None]:
    """Seed all generators for a moment and restore them: probing and building leave training's randomness alone."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _capture_student(
    student: nn.Module, capture: FeatureCapture, inputs: Mapping[str, Any], features: bool
) -> tuple[Any, list[Tensor]]:
    if not features:
        return student(**inputs), []
    with capture.recording(student) as recorded:
        outputs = student(**inputs, **capture.request(student))
    capture.resolve(student, outputs)
    return outputs, capture.collect(outputs, recorded)


def _run(role: str, batch: Mapping[str, Any], forward: Any) -> Any:
    try:
        return forward()
    except SemCKDError:
        raise
    except (ValueError, RuntimeError, IndexError, TypeError, AssertionError) as error:
        shapes = {key: tuple(value.shape) for key, value in batch.items() if isinstance(value, Tensor)}
        raise InputError(
            message(
                f"The {role} cannot take the training data",
                received=f"a batch of {shapes}; the {role} said: {error}",
                expected=f"inputs of the size, type and vocabulary that the {role} was made for",
                todo="preprocess with the model's own processor; when both need different inputs (image sizes, "
                "tokenizers), give the teacher columns of its own named teacher_pixel_values, teacher_input_ids, ...",
            )
        ) from error


def _check_logits(student_outputs: Any, teacher_outputs: Any, needed: bool) -> Tensor | None:
    if not needed:
        try:
            return logits_of(student_outputs, "student")
        except InputError:
            return None
    student, teacher = logits_of(student_outputs, "student"), logits_of(teacher_outputs, "teacher")
    if student.shape != teacher.shape:
        raise InputError(logit_shape_message(tuple(student.shape), tuple(teacher.shape)))
    return student


def _check_teacher_values(
    teacher: Teacher, outputs: Any, features: list[Tensor], batch: Mapping[str, Any], needs_logits: bool
) -> None:
    logits = logits_of(outputs, "teacher") if needs_logits else None
    mask = teacher.inputs(batch).get("attention_mask")
    teacher.check_finite(
        TeacherOutputs(logits, features, mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)
    )


def _label_names(model: nn.Module) -> list[str] | None:
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not names or all(str(name).startswith("LABEL_") for name in names.values()):
        return None
    return [str(names[key]) for key in sorted(names)]


def _takes_anything(model: nn.Module) -> bool:
    """Whether a plain module has one input of an arbitrary name, to which any single tensor is given."""
    return not hasattr(model, "config") and len(forward_parameters(model)) == 1
