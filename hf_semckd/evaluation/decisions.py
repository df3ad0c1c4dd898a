"""What a model decides about the labeled positions of a data set: its samples, tokens or pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.columns import LABEL_COLUMNS
from ..errors import InputError
from ..models.inputs import InputSelector, run_on_inputs
from ..models.outputs import IGNORED, base_model, logits_of
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
    """Predictions and labels of P positions.

    Attributes:
        samples: Which sample a position belongs to (P), from 0; of a span, both ends belong to one.
        predicted, labels: Classes (P), or numbers in regression.
        confidence: Probability of the predicted class (P); None in regression.
        surprise: Negative log-likelihood of the label, in nats (P); None in regression.
    """

    samples: np.ndarray
    predicted: np.ndarray
    labels: np.ndarray
    confidence: np.ndarray | None
    surprise: np.ndarray | None

    @property
    def count(self) -> int:
        """The number of samples."""
        return int(self.samples[-1]) + 1 if len(self.samples) else 0


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
    fits = logits.shape[:2] == labels.shape if task == "tokens" else task != "frames"
    if task == "multi_label":
        fits = labels.shape == logits.shape
    if not fits:
        raise InputError(
            f"The predictions of {type(model).__name__} and the labels do not correspond",
            received=f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}",
            expected="a label for each sample, token, class or pixel that is predicted",
            todo="prepare the labels as for training; evaluate speech recognition with Trainer and compute_metrics",
        )
    if task in ("regression", "multi_label"):
        return Labeling(task)
    config: Any = getattr(base_model(model), "config", None)
    if task != "tokens":
        return Labeling("classes", ignored=getattr(config, "semantic_loss_ignore_index", IGNORED))
    text: Any = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    words = logits.shape[-1] == getattr(text, "vocab_size", None)
    return Labeling("words" if words else "classes", predicts_next_token(model, outputs, batch))


@torch.inference_mode()
def collect_decisions(
    run: Callable[[Mapping[str, Any]], Tensor], batches: Iterable[Mapping[str, Any]], labeling: Labeling
) -> Decisions:
    """Return the decisions about the samples of all batches; `run` returns the logits of a batch."""
    parts: list[tuple[Tensor, ...]] = []
    first = 0
    for batch in batches:
        logits, labels = run(batch).float(), labels_of(batch)
        scores, targets = _positions(logits, labels.to(logits.device), labeling)
        kept = (targets != IGNORED) & (targets != labeling.ignored)
        kept |= labeling.kind == "regression"
        place = torch.arange(first, first + len(targets), device=targets.device)
        found = (place.view(-1, *[1] * (targets.dim() - 1)), targets, *_decide(scores, targets * kept, labeling))
        parts.append(tuple(value.expand(targets.shape)[kept].cpu() for value in found))
        first += len(targets)
    samples, truth, predicted, *rest = [torch.cat(part).numpy() for part in zip(*parts, strict=True)]
    return Decisions(samples, predicted, truth, *(rest or (None, None)))


def _positions(logits: Tensor, labels: Tensor, labeling: Labeling) -> tuple[Tensor, Tensor]:
    """Return logits with the classes last, and the labels along the other axes."""
    if labeling.kind == "spans":
        return logits.transpose(1, 2), labels.clamp(max=logits.shape[1] - 1)
    if labeling.kind == "regression":
        return logits.reshape(labels.shape), labels.float()
    if labeling.kind == "multi_label":
        return logits, labels
    if logits.dim() == 4:
        if logits.shape[-2:] != labels.shape[-2:]:
            logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        return logits.movedim(1, -1), labels
    return (logits[:, :-1], labels[:, 1:]) if labeling.shifted else (logits, labels)


def _decide(scores: Tensor, targets: Tensor, labeling: Labeling) -> tuple[Tensor, ...]:
    """Return predictions, and of classes their confidence and the label's negative log-likelihood."""
    if labeling.kind == "regression":
        return (scores,)
    if labeling.kind == "multi_label":
        surprise = F.binary_cross_entropy_with_logits(scores, targets.float(), reduction="none")
        return scores > 0, torch.sigmoid(scores.abs()), surprise
    likelihoods = scores.log_softmax(-1)
    best, predicted = likelihoods.max(-1)
    return predicted, best.exp(), -likelihoods.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
