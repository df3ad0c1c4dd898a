"""Runs one small batch through both models, to see what their layers look like and whether they fit together."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.columns import has_own_tokens
from ..errors import ConfigurationError, InputError, SemCKDError
from ..features.layers import FeatureSpec
from ..losses import FeatureLoss
from ..losses.logits import LogitMatch
from ..losses.regression import find_head
from ..models.inputs import InputSelector, evaluating, run_on_inputs
from ..models.outputs import detects_objects, holds_images, is_encoder_decoder, logits_of
from ..models.own_loss import OwnLoss, find_own_loss
from ..models.packing import check_documents
from ..models.tasks import Task, head_task, predicts_next_token
from ..teacher.outputs import TeacherDescription
from .classes import check_same_tokens, match_teachers
from .pair import Pair


@dataclass(frozen=True)
class Inspection:
    """What one small batch through both models tells.

    Attributes:
        student_logits: The student's logits, or None when it returns none.
        task: The kind of its head.
        shifts_labels: Whether position n of them predicts label n + 1.
        tokens_aligned: Whether position n of both models stands for the same input.
        writes_text: Whether the student's decoder gives logits of a vocabulary.
        own_loss: How the loss that the student computes comes about.
        matches: Bring the logits of the student and each teacher to the same classes; empty where they are not needed.
        student_specs, student_features: The student's chosen layers, and what they gave; empty without a feature loss.
    """

    batch: Mapping[str, Any]
    student_logits: Tensor | None
    task: Task
    shifts_labels: bool
    tokens_aligned: bool
    writes_text: bool
    own_loss: OwnLoss
    matches: list[LogitMatch]
    student_specs: list[FeatureSpec]
    student_features: list[Tensor]
    teachers: list[TeacherDescription]


@torch.no_grad()
def inspect_pair(
    pair: Pair, batch: Mapping[str, Any], *, logits: bool, features: bool, vocabulary: int | None = None
) -> Inspection:
    """Run a small batch through both models in evaluation mode and check that they fit together.

    `vocabulary` is the number of token ids of the tokenizer, where there is one.
    """
    described = [teacher.describe(batch, logits=logits, features=features) for teacher in pair.teachers]
    student, capture = pair.student, pair.capture
    inputs = InputSelector(student)(batch)
    with evaluating(student):
        if features:
            found = run_on_inputs("student", batch, lambda: capture.find(student, inputs))
            outputs, taken = found.outputs, found.features
            specs = found.describe(of_image=holds_images(student, inputs))
        else:
            outputs, taken, specs = run_on_inputs("student", batch, lambda: student(**inputs)), [], []
        shifts = predicts_next_token(student, outputs, batch)
        check_documents(student, batch, inputs, "student")
    student_logits: Any = None
    # Without a logit term the student may return none.
    with nullcontext() if logits else suppress(InputError):
        student_logits = logits_of(outputs, "student")
    task: Task = "single_label"
    if student_logits is not None:
        task = head_task(student, outputs, student_logits, batch, pair.teacher_models)
    with evaluating(student):
        own_loss = find_own_loss(student, outputs, student_logits, batch, task)
    matches = []
    shapes = [entry.logits for entry in described if entry.logits]
    if logits and shapes:
        check_same_tokens(student_logits.shape, batch)
        matches = match_teachers(student, pair.teacher_models, student_logits.shape, shapes, vocabulary)
    return Inspection(
        batch=batch,
        student_logits=student_logits,
        task=task,
        shifts_labels=shifts,
        tokens_aligned=not has_own_tokens(batch) and not detects_objects(outputs),
        writes_text=is_encoder_decoder(student) and student_logits is not None and student_logits.dim() == 3,
        own_loss=own_loss,
        matches=matches,
        student_specs=specs,
        student_features=taken,
        teachers=described,
    )


def check_loss_fits(loss: FeatureLoss, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Try a feature loss that was given as an object on the features that were found; `InputError` if it cannot."""
    if loss.required_batch_size is not None and loss.required_batch_size != len(student[0]):
        return
    trial = copy.deepcopy(loss).eval().to(student[0].device, student[0].dtype)
    try:
        trial(student, teacher)
    except (SemCKDError, RuntimeError, ValueError, IndexError) as error:
        shapes = [[tuple(feature.shape[1:]) for feature in features] for features in (student, teacher)]
        raise InputError(
            "The feature loss was made for other layers than those that are chosen",
            received=f"student features {shapes[0]}, teacher features {shapes[1]}; the loss said: {error}",
            expected="a loss for these layers, in this order",
            todo="choose the layers with student_layers and teacher_layers, or make the loss for these shapes",
        ) from error


@torch.no_grad()
def check_heads(loss: FeatureLoss, pair: Pair, found: Inspection) -> None:
    """Refuse models that do not end in a linear classifier of their last layer's average; the teacher is loaded."""
    for role, model, inputs, features in (
        ("student", pair.student, InputSelector(pair.student)(found.batch), found.student_features),
        ("teacher", pair.teacher.model, pair.teacher.inputs(found.batch), found.teachers[0].features),
    ):
        seen: list[Tensor] = []
        head = find_head(model, role)
        handle = head.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        try:
            with evaluating(model):
                model(**inputs)
        finally:
            handle.remove()
        average = features[-1].flatten(2).mean(-1) if features and features[-1].dim() == 4 else None
        if average is None or not seen or not torch.allclose(seen[-1], average.to(seen[-1]), rtol=1e-3, atol=1e-4):
            raise ConfigurationError(
                f"{loss.title} needs a classifier that reads the average of the last map; the {role}'s does not",
                received=type(model).__name__,
                expected="global average pooling and a linear classifier, and the last block among the layers",
                todo="use another feature loss",
            )
