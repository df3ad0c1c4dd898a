"""The kinds of task heads, and which items of a batch their losses are taken over."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import InputError
from .outputs import base_model

IGNORED = -100
Task = Literal["single_label", "multi_label", "regression", "tokens"]


def batch_size(batch: Mapping[str, Any]) -> int:
    """Return the number of samples in a batch: the length that most of its tensors have."""
    lengths = [len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    if lengths:
        return max(lengths, key=lengths.count)
    raise InputError(
        "The batch holds no tensor",
        received=f"columns {', '.join(map(repr, batch)) or 'none'}",
        expected="at least one tensor with a batch dimension",
        todo="check the collator and the dataset's columns",
    )


def token_targets(labels: Any, attention_mask: Any, shifted: bool) -> Tensor | None:
    """Return the (B, N) positions that are predicted: labeled ones, else those that are not padding, else None.

    With `shifted`, position n stands for the prediction of token n + 1, and there are N - 1 of them.
    """
    if isinstance(labels, Tensor) and labels.dim() == 2:
        mask = labels != IGNORED
    elif isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        mask = attention_mask.bool()
    else:
        return None
    return mask[:, 1:] if shifted else mask


def task_of(logits: Tensor, labels: Any, problem_type: str | None) -> Task:
    """Tell the kind of head from labels, `config.problem_type`, and logits (B), (B, C), (B, N, C) or (B, C, H, W)."""
    if logits.dim() == 3:
        return "tokens"
    if problem_type == "regression" or logits.dim() == 1 or (logits.dim() == 2 and logits.shape[-1] == 1):
        return "regression"
    floating = isinstance(labels, Tensor) and labels.is_floating_point() and labels.dim() == 2
    return "multi_label" if problem_type == "multi_label_classification" or floating else "single_label"


def shifts_labels(model: nn.Module) -> bool:
    """Whether position n of a model's logits predicts label n + 1: a causal language model, under PEFT too."""
    return type(base_model(model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
