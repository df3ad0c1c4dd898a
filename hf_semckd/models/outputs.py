"""What a model returns: logits, and which of its positions are tokens."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError


def logits_of(outputs: Any, role: str) -> Tensor:
    """Return the logits in a model's output: a field, the output itself, or the first of a tuple."""
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if logits is None and isinstance(outputs, Tensor):
        logits = outputs
    if logits is None and isinstance(outputs, (tuple, list)):
        logits = next((entry for entry in outputs if isinstance(entry, Tensor) and entry.dim() > 1), None)
    if isinstance(logits, Tensor):
        return logits
    fields = ", ".join(map(str, outputs)) if isinstance(outputs, Mapping) else type(outputs).__name__
    raise InputError(
        f"The {role} returns no logits",
        received=f"an output with {fields}",
        expected="a tensor of logits, or an output with `.logits`",
        todo="use a model with a task head (AutoModelFor...), or set logit_weight=0 to distil features alone",
    )


def token_attention(inputs: Mapping[str, Any], labels: Any, model: nn.Module) -> Any:
    """Return the attention mask of the tokens whose features are taken: of the decoder where there is one.

    Where a decoder has no mask of its own, positions with the label -100 are padding.
    """
    if not is_encoder_decoder(model):
        return inputs.get("attention_mask")
    if inputs.get("decoder_attention_mask") is not None:
        return inputs["decoder_attention_mask"]
    return (labels != -100).long() if isinstance(labels, Tensor) and labels.dim() == 2 else None


def tokens_mask(attention_mask: Any, features: list[Tensor]) -> Tensor | None:
    """Return the (B, N) mask that fits the features, or None when there is none.

    Prompt tuning puts learned tokens in front of the sequence; they count as tokens. Multiple choice has a mask
    (B, choices, N) for features of B * choices rows.
    """
    mask = attention_mask
    if isinstance(mask, Tensor) and mask.dim() == 3 and features and len(features[0]) == mask.shape[0] * mask.shape[1]:
        mask = mask.flatten(0, 1)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    lengths = [feature.shape[1] for feature in features if feature.dim() == 3]
    extra = max(lengths, default=mask.shape[1]) - mask.shape[1]
    return torch.cat([mask.new_ones(len(mask), extra), mask], 1) if extra > 0 else mask


def base_model(model: nn.Module) -> nn.Module:
    """Return the model that PEFT wraps, whose kind and signature count; any other model as it is."""
    wrapper: Any = model
    return wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else model


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has an encoder and a decoder, so that its outputs follow the labels too."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def holds_images(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether a model's tokens can be patches of an image: it reads no text, and no decoder follows the labels."""
    return not is_encoder_decoder(model) and not any(name.endswith("input_ids") for name in inputs)


def accepts(function: Any, name: str) -> bool:
    """Whether a function can be called with keyword `name`, by its signature or by taking any keyword."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values())


def first_tensor(output: Any) -> Tensor | None:
    """Return a module's output, or the first tensor in it, which is its hidden state; None when there is none."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)
