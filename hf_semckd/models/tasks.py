"""The kind of a model's task head, and whether its logits predict the next token."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..data.columns import IGNORED
from .inputs import InputSelector
from .outputs import base_model, is_encoder_decoder, returns_spans

# Two ways to compute one mean cross-entropy in half precision differ by less.
SAME_LOSS = 1e-3
Task = Literal["single_label", "multi_label", "regression", "tokens", "frames", "spans"]


def task_of(logits: Tensor, labels: Any, problem_type: str | None) -> Task:
    """Tell the kind of head from labels, `config.problem_type`, and logits (B), (B, C), (B, N, C) or (B, C, H, W).

    Spans have logits as tokens do (see `returns_spans`), and so have masks (B, H, W) of one object and the frames of a
    sound, whose labels (if any) are not along them.
    """
    if logits.dim() == 3:
        return "tokens"
    if problem_type == "regression" or logits.dim() == 1 or (logits.dim() == 2 and logits.shape[-1] == 1):
        return "regression"
    floating = isinstance(labels, Tensor) and labels.is_floating_point() and labels.dim() == 2
    return "multi_label" if problem_type == "multi_label_classification" or floating else "single_label"


def find_shift(logits: Tensor, labels: Tensor, loss: Tensor) -> bool | None:
    """Tell from a model's own loss whether position n of its logits (B, N, V) predicts label n + 1, or n.

    None where it is neither mean cross-entropy, as with label smoothing.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2] or labels.shape[1] < 2:
        return None
    scores, targets = logits.float().transpose(1, 2), labels.to(logits.device)
    shifted = F.cross_entropy(scores[..., :-1], targets[:, 1:], ignore_index=IGNORED)
    plain = F.cross_entropy(scores, targets, ignore_index=IGNORED)
    far = [float((loss.float() - value).abs() / value.abs().clamp(min=1e-6)) for value in (plain, shifted)]
    # NaN, of labels that are all ignored, is near to nothing.
    return far[1] < far[0] if min(far) < SAME_LOSS and far[0] != far[1] else None


def shifts_labels(model: nn.Module) -> bool:
    """Whether a model is a causal language model by its name, under PEFT too; see `find_shift` for what it does."""
    return type(base_model(model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def head_task(
    model: nn.Module, outputs: Any, logits: Tensor, batch: Mapping[str, Any], teachers: Sequence[nn.Module] = ()
) -> Task:
    """Return the kind of a model's head, by what it gave for a batch; see `task_of`.

    Where neither labels nor the model's configuration tell, its teachers' do.
    """
    problems = (getattr(getattr(entry, "config", None), "problem_type", None) for entry in (model, *teachers))
    if returns_spans(outputs):
        return "spans"
    images, labels = batch.get("pixel_values"), batch.get("labels")
    if logits.dim() == 3 and isinstance(images, Tensor) and logits.shape[1:] == images.shape[-2:]:
        return "multi_label"
    told = [entry for entry in (labels, batch.get("attention_mask")) if isinstance(entry, Tensor) and entry.dim() == 2]
    reads_text = "input_ids" in batch or is_encoder_decoder(model)
    if logits.dim() == 3 and not reads_text and (not told or told[0].shape[1] != logits.shape[1]):
        return "frames"
    return task_of(logits, labels, next(filter(None, problems), None))


def predicts_next_token(student: nn.Module, outputs: Any, batch: Mapping[str, Any]) -> bool:
    """Tell whether position n of a student's logits predicts token n + 1, by the loss that it computes itself.

    `student` is in evaluation mode, and `outputs` are what it gave for the batch. Without labels, its inputs are.
    """
    if is_encoder_decoder(student):
        return False
    inputs = InputSelector(student)(batch)
    logits, labels = getattr(outputs, "logits", None), batch.get("labels", inputs.get("input_ids"))
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or logits.dim() != 3 or labels.dim() != 2:
        return shifts_labels(student)
    found = None
    with suppress(ValueError, RuntimeError, IndexError, TypeError, AttributeError):
        found = find_shift(logits, labels, student(**{**inputs, "labels": labels})["loss"])
    return shifts_labels(student) if found is None else found


def label_order(names: Sequence[str], wanted: Sequence[str]) -> Tensor | None:
    """Return where the wanted names are among a model's; None where these are not the same ones, each once."""
    if sorted(names) != sorted(wanted) or len({*names}) < len(names):
        return None
    return torch.tensor([names.index(name) for name in wanted])


def label_names(model: nn.Module) -> list[str] | None:
    """Return the names of a model's classes in order, in lower case; None where it has none of its own."""
    names = class_names(getattr(model, "config", None))
    return None if names is None else [name.lower() for name in names]


def class_names(config: Any) -> list[str] | None:
    """Return the names of the classes in a configuration, in order; None where they were never named."""
    names = getattr(config, "id2label", None)
    if not names or all(str(name).startswith("LABEL_") for name in names.values()):
        return None
    return [str(names[key]) for key in sorted(names)]
