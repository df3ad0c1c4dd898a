"""Losses on logits: distillation (Hinton et al., 2015) and the task loss of models that compute none."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..data.columns import IGNORED, IGNORED_PIXEL
from ..errors import InputError, message
from ..features.precision import at_least_float32
from ..models.outputs import token_targets
from ..models.packing import document_starts
from ..models.tasks import Task
from .positions import masked_mean, zero_masked
from .sampled_logits import SampledLogits, sampled_kd_loss


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return T^2 * KL(teacher/T || student/T) (Hinton et al., 2015), (...) for logits (..., classes), in nats.

    The factor T^2 keeps the size of the gradient independent of T > 0. At least in float32, without teacher gradient.
    """
    log_student = F.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    log_teacher = F.log_softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1) * temperature**2


def binary_kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return `kd_loss` of two Bernoullis, averaged over independent labels: (...) for logits (..., labels)."""
    student = at_least_float32(student_logits) / temperature
    teacher = at_least_float32(teacher_logits.detach()) / temperature
    positive = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    negative = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return (positive + negative).mean(-1) * temperature**2


@dataclass(frozen=True)
class LogitMatch:
    """Brings the logits of both models to the same classes.

    Attributes:
        vocabulary: Number of token ids; logits after them (padding of an embedding matrix) are left out. None: none.
        order: (C) the teacher's class for each of the student's, None where the order is the same.
        dim: The dimension of the classes.
    """

    vocabulary: int | None = None
    order: Tensor | None = None
    dim: int = -1

    def __call__(self, student: Tensor, teacher: Tensor | SampledLogits) -> tuple[Tensor, Tensor | SampledLogits]:
        """Return the student's and the teacher's logits of the classes that both know, in the student's order.

        Samples were drawn from these classes alone.
        """
        if self.vocabulary is not None:
            student = student[..., : self.vocabulary]
        return student, teacher if isinstance(teacher, SampledLogits) else self.teacher(teacher)

    def teacher(self, logits: Tensor) -> Tensor:
        """Return the teacher's logits alone, likewise."""
        if self.vocabulary is not None:
            return logits[..., : self.vocabulary]
        if self.order is not None:
            logits = logits.index_select(self.dim, self.order.to(logits.device, non_blocking=True))
        return logits


@dataclass(frozen=True)
class LogitMixture:
    """Joins the logits z_k of several teachers, so that they teach with the mean of their probabilities.

    softmax(mixture / T) = sum over k of w_k * softmax(z_k / T), at the temperature T > 0 of the distillation; likewise
    the sigmoids of independent labels. The outputs of a regression are averaged. `weights` sum to 1, and `matches`
    bring each teacher's logits to the student's classes.
    """

    matches: Sequence[LogitMatch]
    weights: Sequence[float]
    temperature: float
    task: Task

    def __call__(self, logits: Sequence[Tensor], batch: Mapping[str, Any]) -> Tensor:
        """Return logits of the teachers' shape, at least in float32; padding of spans is told by the batch's mask."""
        matched = [at_least_float32(match.teacher(z)) for match, z in zip(self.matches, logits, strict=True)]
        if self.task == "regression":
            return torch.stack([w * z for w, z in zip(self.weights, matched, strict=True)]).sum(0)
        if self.task == "spans":
            matched = [_without_padding(z, batch.get("attention_mask")) for z in matched]
        softened = [z / self.temperature for z in matched]
        if self.task == "multi_label":
            log_odds = self._log_mean(map(F.logsigmoid, softened)) - self._log_mean(F.logsigmoid(-z) for z in softened)
            return log_odds * self.temperature
        dim = -1 if self.task in ("tokens", "frames") else 1
        return self._log_mean(F.log_softmax(z, dim) for z in softened) * self.temperature

    def _log_mean(self, logs: Iterable[Tensor]) -> Tensor:
        """Return the logarithm of the weighted mean of what the logarithms of are given."""
        return reduce(torch.logaddexp, (log + math.log(w) for w, log in zip(self.weights, logs, strict=True)))


# Logits up to this number of elements are compared at once, more of them in pieces.
PIECE = 2**24


def logit_loss_sum(
    student: Tensor,
    teacher: Tensor | SampledLogits,
    batch: Mapping[str, Any],
    temperature: float,
    task: Task,
    shifted: bool,
    frames: Tensor | None = None,
) -> Tensor:
    """Return the distillation loss of logits of one shape, summed over the items that `count_items` counts.

    Token tasks count labeled positions only (all but padding without labels); causal language models predict the
    next token (`shifted`), so the last position is left out. Regression compares outputs by their squared difference.
    Labels and attention mask come from `batch`, the mask of `frames` (B, T) from the model. Of tokens, samples of the
    teacher's logits will do: the loss is estimated then. Raises `InputError` when the shapes differ.
    """
    if isinstance(teacher, SampledLogits):
        return _tokens_sum(student, teacher, batch, temperature, shifted)
    if student.shape != teacher.shape:
        raise InputError(logit_shape_message(tuple(student.shape), tuple(teacher.shape)))
    if task == "regression":
        error = F.mse_loss(at_least_float32(student), at_least_float32(teacher), reduction="none")
        return error.reshape(len(error), -1).mean(1).sum()
    if task == "multi_label":
        return binary_kd_loss(student.flatten(1), teacher.flatten(1), temperature).sum()
    if task == "tokens":
        return _tokens_sum(student, teacher, batch, temperature, shifted)
    if task == "frames":
        # Frames whose mask (B, T) is 0 come from padding; a sample's loss is the mean over its others.
        kept = None if frames is None or frames.shape != student.shape[:2] else frames
        divergence = kd_loss(zero_masked(student, kept), zero_masked(teacher, kept), temperature)
        return masked_mean(divergence, kept).sum()
    if task == "spans":
        student, teacher = (_without_padding(logits, batch.get("attention_mask")) for logits in (student, teacher))
        return kd_loss(student.movedim(1, -1), teacher.movedim(1, -1), temperature).mean(1).sum()
    per_item = kd_loss(student.movedim(1, -1), teacher.movedim(1, -1), temperature)
    return _mean_of_pixels(per_item, batch.get("labels")).sum() if per_item.dim() > 1 else per_item.sum()


def _tokens_sum(
    student: Tensor,
    teacher: Tensor | SampledLogits,
    batch: Mapping[str, Any],
    temperature: float,
    shifted: bool,
) -> Tensor:
    """Return the sum of the divergences at the tokens that are predicted."""
    mask = token_targets(batch.get("labels"), batch.get("attention_mask"), shifted, document_starts(batch))
    every = slice(None)
    if shifted:
        student, teacher = student[:, :-1], teacher[every, :-1]
    if mask is None:
        # Items are samples then: nothing tells which tokens count.
        return _divergence(student, teacher, temperature).sum() / max(student.shape[1], 1)
    if mask.shape != student.shape[:2]:
        # An image in front of the text (GIT), for which there is no label.
        student, teacher = student[:, -mask.shape[1] :], teacher[every, -mask.shape[1] :]
    return _masked_divergence(student, teacher, mask, temperature)


def _divergence(student: Tensor, teacher: Tensor | SampledLogits, temperature: float) -> Tensor:
    loss: Any = sampled_kd_loss if isinstance(teacher, SampledLogits) else kd_loss
    return loss(student, teacher, temperature)


def _without_padding(logits: Tensor, padding: Tensor | None) -> Tensor:
    """Return logits (B, N, 2) of spans: a low one, finite over a temperature, gives padding no probability."""
    logits = at_least_float32(logits)
    lowest = -(torch.finfo(logits.dtype).max ** 0.5)
    return logits if padding is None else logits.masked_fill((padding == 0).unsqueeze(-1), lowest)


def _mean_of_pixels(per_pixel: Tensor, labels: Any) -> Tensor:
    """Return the mean (B) of (B, h, w) over the pixels that have a label (B, H, W): 255 stands for none, as -100."""
    if per_pixel.dim() != 3 or not isinstance(labels, Tensor) or labels.dim() != 3:
        return per_pixel.flatten(1).mean(1)
    known = ((labels != IGNORED) & (labels != IGNORED_PIXEL)).to(per_pixel.dtype).unsqueeze(1)
    known = F.interpolate(known, per_pixel.shape[1:], mode="nearest").squeeze(1)
    return (per_pixel * known).flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the usual task loss for models that compute none: mean cross-entropy, or BCE / MSE for float labels."""
    if labels.is_floating_point():
        if labels.dim() == 2 and labels.shape == logits.shape and logits.shape[1] > 1:
            return F.binary_cross_entropy_with_logits(logits, labels)
        return F.mse_loss(logits.squeeze(-1), labels)
    return F.cross_entropy(at_least_float32(logits).flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def logit_shape_message(student: tuple[int, ...], teacher: tuple[int, ...]) -> str:
    """Return the error message for two models that do not predict the same classes."""
    return message(
        "Teacher and student logits have different shapes, so logit distillation is impossible",
        received=f"student {student}, teacher {teacher} (the last dimension is the number of labels, or the "
        "vocabulary)",
        expected="the same labels, in the same order, for both",
        todo="load the student with num_labels (and id2label) of the teacher; pass the tokenizer as "
        "processing_class where vocabularies were only padded differently; or set logit_weight=0 to distill "
        "features alone",
    )


def _masked_divergence(student: Tensor, teacher: Tensor | SampledLogits, mask: Tensor, temperature: float) -> Tensor:
    """Return the sum of the divergences at the positions of a mask (B, N).

    Selecting rows by a mask would be a host sync. All positions are computed instead: small logits at once; large ones
    (a vocabulary) a few positions at a time, and again in backward, so that nothing is kept but the logits themselves.
    """
    if student.numel() <= PIECE:
        return _masked_sum(student, teacher, mask, temperature)
    length = max(PIECE * student.shape[1] // student.numel(), 1)
    parts = zip(*(tensor.split(length, dim=1) for tensor in (student, teacher, mask)), strict=True)
    recomputed = partial(checkpoint, _masked_sum, use_reentrant=False, preserve_rng_state=False)
    return torch.stack([recomputed(*part, temperature) for part in parts]).sum()


def _masked_sum(student: Tensor, teacher: Tensor | SampledLogits, mask: Tensor, temperature: float) -> Tensor:
    # Masked logits may be NaN or infinite. Masking the loss alone would leave a gradient of 0 * NaN.
    student = student.masked_fill(~mask.unsqueeze(-1), 0.0)
    if isinstance(teacher, SampledLogits):
        return sampled_kd_loss(student, teacher, temperature).masked_fill(~mask, 0.0).sum()
    return kd_loss(student, teacher.masked_fill(~mask.unsqueeze(-1), 0.0), temperature).sum()
