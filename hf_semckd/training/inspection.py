"""Runs one small batch through both models, to see what their layers look like and whether they fit together."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError, InputError, SemCKDError
from ..features.capture import FeatureCapture
from ..features.layers import FeatureSpec, describe
from ..features.targets import TeacherTargets
from ..losses import FeatureLoss
from ..losses.logits import logit_shape_message
from ..losses.simkd import find_head
from ..models.inputs import select_inputs
from ..models.outputs import is_encoder_decoder, logits_of
from ..teacher.outputs import TeacherOutputs
from ..teacher.teacher import Teacher


@dataclass(frozen=True)
class Inspection:
    """What one small batch through both models tells.

    Attributes:
        student_logits: The student's logits, or None when it returns none.
        student_specs: The student's chosen layers; empty when features are not distilled.
        teacher_specs: The teacher's chosen layers.
        student_features: What the student's layers gave.
        teacher_features: What the teacher's layers gave.
        tokens_aligned: Whether position n of both models stands for the same input.
        teacher_logits: Shape of the teacher's logits, or None when they are not needed.
    """

    student_logits: Tensor | None
    student_specs: list[FeatureSpec]
    teacher_specs: list[FeatureSpec]
    student_features: list[Tensor]
    teacher_features: list[Tensor]
    tokens_aligned: bool
    teacher_logits: tuple[int, ...] | None = None


@torch.no_grad()
def inspect_pair(
    student: nn.Module,
    student_capture: FeatureCapture,
    teacher: Teacher,
    batch: Mapping[str, Any],
    *,
    features: bool,
    logits: bool,
) -> Inspection:
    """Run a small batch through both models in evaluation mode and check that they fit together.

    Raises:
        InputError: When a model cannot take the batch, or their logits differ in shape.
        LayerNotFoundError: When a chosen layer does not exist.
        TeacherOutputError: When the teacher's outputs are not finite.
    """
    shape, teacher_specs, teacher_features = _look_at_teacher(teacher, batch, features, logits)
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
    return Inspection(
        _check_logits(student_outputs, shape, logits),
        [
            describe(x, n, student, student_inputs)
            for x, n in zip(student_features, student_capture.names(), strict=False)
        ],
        teacher_specs,
        student_features,
        teacher_features,
        not teacher.has_own_tokens(batch),
        shape,
    )


def _look_at_teacher(
    teacher: Teacher, batch: Mapping[str, Any], features: bool, logits: bool
) -> tuple[tuple[int, ...] | None, list[FeatureSpec], list[Tensor]]:
    """Return the shape of the teacher's logits, its layers, and their features unless it stays unloaded."""
    inputs = teacher.inputs(batch)
    if teacher.note is not None:
        if features:
            teacher.capture.layers = list(teacher.note.layers)
        known = teacher.note.logits
        return known if logits else None, teacher.note.specs_for(inputs) if features else [], []
    _check_decoder_inputs(teacher.model, inputs)
    outputs, recorded = _run("teacher", batch, lambda: teacher.forward(inputs, features=features))
    taken: list[Tensor] = []
    if features:
        teacher.capture.resolve(teacher.model, outputs)
        taken = teacher.capture.collect(outputs, recorded)
    _check_teacher_values(teacher, outputs, taken, batch, logits)
    specs = [describe(x, n, teacher.model, inputs) for x, n in zip(taken, teacher.capture.names(), strict=False)]
    return tuple(logits_of(outputs, "teacher").shape) if logits else None, specs, taken


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
            f"The {role} cannot take the training data",
            received=f"a batch of {shapes}; the {role} said: {error}",
            expected=f"inputs of the size, type and vocabulary that the {role} was made for",
            todo="preprocess with the model's own processor; when both need different inputs (image sizes, "
            "tokenizers), give the teacher columns of its own named teacher_pixel_values, teacher_input_ids, ...",
        ) from error


def _check_logits(student_outputs: Any, teacher_shape: tuple[int, ...] | None, needed: bool) -> Tensor | None:
    if not needed or teacher_shape is None:
        try:
            return logits_of(student_outputs, "student")
        except InputError:
            return None
    student = logits_of(student_outputs, "student")
    # Of a teacher that is not loaded the classes are known, not the batch.
    if tuple(student.shape)[-len(teacher_shape) :] != teacher_shape:
        raise InputError(logit_shape_message(tuple(student.shape), teacher_shape))
    return student


def _check_teacher_values(
    teacher: Teacher, outputs: Any, features: list[Tensor], batch: Mapping[str, Any], needs_logits: bool
) -> None:
    logits = logits_of(outputs, "teacher") if needs_logits else None
    mask = teacher.inputs(batch).get("attention_mask")
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    teacher.check_finite(TeacherOutputs(logits, TeacherTargets.of_whole(features, mask), mask))


def check_loss_fits(loss: FeatureLoss, found: Inspection) -> None:
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
            "The feature loss was made for other layers than those that are chosen",
            received=f"student features {shapes[0]}, teacher features {shapes[1]}; the loss said: {error}",
            expected="a loss for these layers, in this order",
            todo="choose the layers with student_layers and teacher_layers, or make the loss for these shapes",
        ) from error


@torch.no_grad()
def check_heads(
    loss: FeatureLoss, student: nn.Module, teacher: Teacher, batch: Mapping[str, Any], found: Inspection
) -> None:
    """Check that both models end in a linear classifier that reads the average of their last layer.

    Args:
        loss: The loss that gives the student the teacher's classifier.
        student: The student.
        teacher: The teacher, loaded.
        batch: The batch that was probed.
        found: What both models gave for it.

    Raises:
        ConfigurationError: When one of them does not.
    """
    for role, model, inputs, features in (
        ("student", student, select_inputs(student, batch), found.student_features),
        ("teacher", teacher.model, teacher.inputs(batch), found.teacher_features),
    ):
        seen: list[Tensor] = []
        head = find_head(model, role)
        handle = head.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        was_training = model.training
        try:
            model.eval()(**inputs)
        finally:
            handle.remove()
            model.train(was_training)
        average = features[-1].flatten(2).mean(-1) if features and features[-1].dim() == 4 else None
        if average is None or not seen or not torch.allclose(seen[-1], average.to(seen[-1]), rtol=1e-3, atol=1e-4):
            raise ConfigurationError(
                f"{loss.title} needs a classifier that reads the average of the last map; the {role}'s does not",
                received=type(model).__name__,
                expected="global average pooling and a linear classifier, and the last block among the layers",
                todo="use another feature loss",
            )


def _check_decoder_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    if is_encoder_decoder(model) and "decoder_input_ids" not in inputs:
        raise InputError(
            f"{type(model).__name__} has a decoder, and the batch holds nothing for it to start from",
            received=f"columns {', '.join(map(repr, inputs))}",
            expected="decoder_input_ids beside the labels",
            todo="use DataCollatorForSeq2Seq(tokenizer, model=student), which makes them from the labels",
        )
