"""What a model decides about the labeled positions of a data set: its samples, tokens or pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.columns import IGNORED, LABEL_COLUMNS
from ..errors import InputError
from ..models.inputs import InputSelector, run_on_inputs
from ..models.outputs import base_model, logits_of
from ..models.tasks import head_task, predicts_next_token

SPANS = ("start_positions", "end_positions")
Kind = Literal["classes", "multi_label", "regression", "words", "spans"]


@dataclass(frozen=True)
class Labeling:
    """What the logits of a model stand for: `words` are those of a vocabulary, `shifted` where n predicts n + 1.

    Labels that are `ignored` count for nothing: -100 in every task, and what the configuration names for pixels.
    """

    kind: Kind
    shifted: bool = False
    ignored: int = IGNORED


@dataclass(frozen=True)
class Decisions:
    """Predictions and labels of P positions of `count` samples.

    Attributes:
        samples: Which sample a position belongs to (P), from 0; of a span, both ends belong to one.
        predicted, labels: Classes (P), or in regression K numbers of each sample (P, K).
        confidence: Probability of the predicted class (P); None in regression.
        surprise: Negative log-likelihood of the label, in nats (P); None in regression.
    """

    count: int
    samples: np.ndarray
    predicted: np.ndarray
    labels: np.ndarray
    confidence: np.ndarray | None = None
    surprise: np.ndarray | None = None


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """Return the labels of a batch: (B), (B, N), (B, C), (B, H, W), or (B, 2) of spans; `InputError` without any."""
    if all(isinstance(batch.get(name), Tensor) for name in SPANS):
        return torch.stack([batch[name] for name in SPANS], dim=1)
    for name in LABEL_COLUMNS:
        if isinstance(batch.get(name), Tensor):
            return batch[name]
    raise InputError(
        "The data set to evaluate on has no labels",
        received=f"columns {', '.join(map(repr, batch))}",
        expected=f"one of {', '.join(map(repr, LABEL_COLUMNS))}, or {' and '.join(map(repr, SPANS))}",
        todo="keep the column of labels when the data set is prepared, or name it 'labels'",
    )


@torch.inference_mode()
def find_labeling(model: nn.Module, batch: Mapping[str, Any]) -> Labeling:
    """Return what the logits of a model in evaluation mode stand for; `InputError` where labels do not match them."""
    labels = labels_of(batch)
    outputs = run_on_inputs("model", batch, lambda: model(**InputSelector(model)(batch)))
    logits = logits_of(outputs, "model")
    task = head_task(model, outputs, logits, batch)
    if task == "spans":
        return Labeling("spans")
    if task == "frames" or (task == "tokens" and logits.shape[:2] != labels.shape):
        raise _no_match(logits, labels)
    if task in ("regression", "multi_label"):
        return Labeling(task)
    config: Any = getattr(base_model(model), "config", None)
    if task != "tokens":
        return Labeling("classes", ignored=getattr(config, "semantic_loss_ignore_index", IGNORED))
    text: Any = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    words = logits.shape[-1] == getattr(text, "vocab_size", None)
    return Labeling("words" if words else "classes", predicts_next_token(model, outputs, batch))


class DecisionCollector:
    """Collects what a model, `name` in errors, decides, batch by batch."""

    def __init__(self, labeling: Labeling, name: str):
        self._labeling, self._name = labeling, name
        self._parts: list[tuple[Tensor, ...]] = []
        self._count = 0

    @torch.inference_mode()
    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take the logits of a batch and its labels, see `labels_of`; `InputError` where they do not correspond."""
        logits = logits.float()
        scores, targets = positions(logits, labels.to(logits.device), self._labeling)
        wild = scores.isnan() | (scores == float("inf"))  # -inf rules a class out
        if wild.any():
            raise InputError(
                f"The {self._name} returns NaN or infinite logits",
                received=f"{int(wild.sum())} of {scores.numel()} logits that are no numbers",
                expected="finite logits",
                todo="check its weights and its precision",
            )
        rows = torch.arange(self._count, self._count + len(targets), device=targets.device)
        self._count += len(targets)
        if self._labeling.kind == "regression":
            self._parts.append((rows.cpu(), targets.cpu(), scores.cpu()))
            return
        kept = (targets != IGNORED) & (targets != self._labeling.ignored)
        classes = 2 if self._labeling.kind == "multi_label" else scores.shape[-1]
        wrong = targets[kept & ((targets < 0) | (targets >= classes))]
        if len(wrong):
            raise InputError(
                f"A label is no class of the {self._name}",
                received=f"the label {wrong[0].item():g}, and {classes} classes",
                expected=f"labels from 0 to {classes - 1}, or {IGNORED} for what does not count",
                todo="check the column of labels, and the models' number of labels",
            )
        places = rows.view(-1, *[1] * (targets.dim() - 1)).expand(targets.shape)
        found = (places, targets, *_decide(scores, targets * kept, self._labeling))
        self._parts.append(tuple(value[kept].cpu() for value in found))

    def decisions(self) -> Decisions:
        """Return what was collected; `InputError` where no label counts."""
        samples, truth, predicted, *rest = [torch.cat(part).numpy() for part in zip(*self._parts, strict=True)]
        if not len(samples):
            raise InputError(
                "No label of the data set counts",
                received=f"{self._count} samples, all of whose labels are {IGNORED}",
                expected="labels of classes",
                todo="pass a labeled split: those of test splits are often hidden",
            )
        return Decisions(self._count, samples, predicted, truth, *rest)


def positions(logits: Tensor, labels: Tensor, labeling: Labeling) -> tuple[Tensor, Tensor]:
    """Return logits with the classes last, and the labels along the other axes."""
    if labeling.kind == "spans":
        # An answer that was cut off counts for nothing, as in training.
        inside = ((labels >= 0) & (labels < logits.shape[1])).all(1, keepdim=True)
        return logits.transpose(1, 2), labels.where(inside, torch.full_like(labels, IGNORED))
    if labeling.kind == "regression":
        if logits.numel() != labels.numel():
            raise _no_match(logits, labels)
        return logits.reshape(len(labels), -1), labels.float().reshape(len(labels), -1)
    if labeling.kind == "multi_label":
        fits = logits.shape == labels.shape
        scores, targets = logits, labels
    elif logits.dim() == 4:
        if logits.shape[-2:] != labels.shape[-2:]:
            logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        scores, targets = logits.movedim(1, -1), labels
        fits = scores.shape[:-1] == targets.shape
    else:
        scores, targets = (logits[:, :-1], labels[:, 1:]) if labeling.shifted else (logits, labels)
        fits = scores.shape[:-1] == targets.shape
    if not fits:
        raise _no_match(logits, labels)
    return scores, targets


def _no_match(logits: Tensor, labels: Tensor) -> InputError:
    return InputError(
        "The predictions and the labels do not correspond",
        received=f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}",
        expected="a label for each sample, token, class or pixel that is predicted",
        todo="prepare the labels as for training; evaluate speech recognition with Trainer and compute_metrics",
    )


def _decide(scores: Tensor, targets: Tensor, labeling: Labeling) -> tuple[Tensor, ...]:
    """Return predicted classes, their confidence, and the label's negative log-likelihood."""
    if labeling.kind == "multi_label":
        surprise = F.binary_cross_entropy_with_logits(scores, targets.float(), reduction="none")
        return scores > 0, torch.sigmoid(scores.abs()), surprise
    likelihoods = scores.log_softmax(-1)
    best, predicted = likelihoods.max(-1)
    return predicted, best.exp(), -likelihoods.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
