"""Runs one small batch through both models, to see what their layers look like and whether they fit together."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.columns import has_own_tokens
from ..errors import ConfigurationError, InputError, SemCKDError
from ..features.capture import FeatureCapture
from ..features.layers import FeatureSpec, describe
from ..losses import FeatureLoss
from ..losses.logits import logit_shape_message
from ..losses.simkd import find_head
from ..models.inputs import check_decoder_inputs, run_on_inputs, select_inputs
from ..models.outputs import logits_of
from ..teacher.outputs import TeacherDescription
from .pair import Pair


@dataclass(frozen=True)
class Inspection:
    """What one small batch through both models tells.

    Attributes:
        student_logits: The student's logits, or None when it returns none.
        student_specs: The student's chosen layers; empty when features are not distilled.
        student_features: What they gave.
        teacher: The teacher's layers and logits.
        tokens_aligned: Whether position n of both models stands for the same input.
    """

    student_logits: Tensor | None
    student_specs: list[FeatureSpec]
    student_features: list[Tensor]
    teacher: TeacherDescription
    tokens_aligned: bool


@torch.no_grad()
def inspect_pair(pair: Pair, batch: Mapping[str, Any], *, logits: bool, features: bool) -> Inspection:
    """Run a small batch through both models in evaluation mode and check that they fit together.

    Raises:
        InputError: When a model cannot take the batch, or their logits differ in shape.
        LayerNotFoundError: When a chosen layer does not exist.
        TeacherOutputError: When the teacher's outputs are not finite.
    """
    described = pair.teacher.describe(batch, logits=logits, features=features)
    student, capture = pair.student, pair.capture
    inputs = select_inputs(student, batch)
    check_decoder_inputs(student, inputs)
    was_training = student.training
    student.eval()
    try:
        outputs, taken = run_on_inputs("student", batch, lambda: _capture_student(student, capture, inputs, features))
    finally:
        student.train(was_training)
    return Inspection(
        student_logits=_check_logits(outputs, described.logits, logits),
        student_specs=[describe(x, n, student, inputs) for x, n in zip(taken, capture.names(), strict=False)],
        student_features=taken,
        teacher=described,
        tokens_aligned=not has_own_tokens(batch),
    )


def _capture_student(
    student: nn.Module, capture: FeatureCapture, inputs: Mapping[str, Any], features: bool
) -> tuple[Any, list[Tensor]]:
    if not features:
        return student(**inputs), []
    with capture.recording(student) as recorded:
        outputs = student(**inputs, **capture.request(student))
    capture.resolve(student, outputs)
    return outputs, capture.collect(outputs, recorded)


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


def check_loss_fits(loss: FeatureLoss, found: Inspection) -> None:
    """Try a feature loss that was given as an object on the features that were inspected.

    Raises:
        InputError: When it cannot take them.
    """
    shapes = [[tuple(x.shape[1:]) for x in features] for features in (found.student_features, found.teacher.features)]
    if loss.required_batch_size is not None and loss.required_batch_size != len(found.student_features[0]):
        return
    trial = copy.deepcopy(loss).eval().to(found.student_features[0].device, found.student_features[0].dtype)
    try:
        trial(found.student_features, found.teacher.features)
    except (SemCKDError, RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            "The feature loss was made for other layers than those that are chosen",
            received=f"student features {shapes[0]}, teacher features {shapes[1]}; the loss said: {error}",
            expected="a loss for these layers, in this order",
            todo="choose the layers with student_layers and teacher_layers, or make the loss for these shapes",
        ) from error


@torch.no_grad()
def check_heads(loss: FeatureLoss, pair: Pair, batch: Mapping[str, Any], found: Inspection) -> None:
    """Check that both models end in a linear classifier that reads the average of their last layer.

    Args:
        loss: The loss that gives the student the teacher's classifier.
        pair: Student and teacher, which is loaded.
        batch: The batch that was inspected.
        found: What both models gave for it.

    Raises:
        ConfigurationError: When one of them does not.
    """
    for role, model, inputs, features in (
        ("student", pair.student, select_inputs(pair.student, batch), found.student_features),
        ("teacher", pair.teacher.model, pair.teacher.inputs(batch), found.teacher.features),
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
