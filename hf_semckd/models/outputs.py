"""What a model returns: logits, and which of its positions are tokens."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.columns import IGNORED
from ..errors import InputError


def logits_of(outputs: Any, role: str) -> Tensor:
    """Return the logits in a model's output: a field, the output itself, or the first of a tuple.

    Those of the start and the end of an answer (question answering) come as (B, N, 2).
    """
    if returns_spans(outputs):
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)
    if detects_objects(outputs):
        raise InputError(
            f"The {role} detects objects: its queries have no order, so the logits of two models cannot be compared",
            received=f"an output with {', '.join(map(str, outputs))}",
            expected="one prediction for each sample, token or pixel",
            todo="set logit_weight=0 to learn from the boxes' own loss and from features",
        )
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if logits is None:
        logits = getattr(outputs, "prediction_logits", None)
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
        todo="use a model with a task head (AutoModelFor...), or set logit_weight=0 to distill features alone",
    )


def returns_spans(outputs: Any) -> bool:
    """Whether a model's output scores tokens as the start and the end of an answer."""
    return all(isinstance(getattr(outputs, f"{end}_logits", None), Tensor) for end in ("start", "end"))


def detects_objects(outputs: Any) -> bool:
    """Whether a model's output holds boxes: those of queries, whose order means nothing."""
    return getattr(outputs, "pred_boxes", None) is not None


def token_attention(inputs: Mapping[str, Any], labels: Any, model: nn.Module) -> Any:
    """Return the attention mask of the tokens whose features are taken: of the decoder where there is one.

    Where a decoder has no mask of its own, positions with the label -100 are padding; one that reads the inputs again
    (BART, T5 as classifiers) has their mask.
    """
    if not is_encoder_decoder(model):
        mask = inputs.get("attention_mask")
        return inputs.get("pixel_attention_mask") if mask is None else mask
    if inputs.get("decoder_attention_mask") is not None:
        return inputs["decoder_attention_mask"]
    if isinstance(labels, Tensor) and labels.dim() == 2:
        return (labels != IGNORED).long()
    return inputs.get("attention_mask") if "decoder_input_ids" not in inputs else None


def tokens_mask(
    attention_mask: Any,
    features: list[Tensor],
    model: nn.Module | None = None,
    text_place: tuple[int, bool] | None = None,
) -> Tensor | None:
    """Return the (B, N) mask that fits a model's features, or None when there is none.

    Prompt tuning (PEFT) puts learned tokens in front of the sequence; they count as tokens. So do those of an image
    around a text, as its place says (see `modalities.TextPlace`). Speech models know which of their frames come from
    padding. Multiple choice has a mask (B, choices, N) for features of B * choices rows.
    """
    mask = attention_mask
    if isinstance(mask, Tensor) and mask.dim() == 3 and features and len(features[0]) == mask.shape[0] * mask.shape[1]:
        mask = mask.flatten(0, 1)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    length = max((feature.shape[1] for feature in features if feature.dim() == 3), default=mask.shape[1])
    of_frames = None if model is None else getattr(base_model(model), "_get_feature_vector_attention_mask", None)
    if of_frames is not None and length < mask.shape[1]:
        return of_frames(length, mask)
    extra = length - mask.shape[1]
    if extra <= 0:
        return mask
    if text_place is None and not hasattr(model, "get_base_model"):
        # Tokens beside the text: nothing tells where they are.
        return None
    front, others_count = (extra, True) if text_place is None else text_place
    return F.pad(mask, (front, extra - front), value=int(others_count))


def layer_masks(
    inputs: Mapping[str, Any],
    labels: Any,
    model: nn.Module,
    features: list[Tensor],
    sides: Sequence[str],
    text_places: Sequence[tuple[int, bool] | None] = (),
) -> Tensor | list[Tensor | None] | None:
    """Return the mask of a model's features: one for all, or each layer's own.

    `sides` and `text_places` are those of `FeatureCapture`.
    """
    tokens = token_attention(inputs, labels, model)
    if not sides and len({*text_places}) < 2 and None not in text_places:
        return tokens_mask(tokens, features, model, *text_places[:1])
    masks: list[Tensor | None] = []
    for index, feature in enumerate(features):
        own = inputs.get("attention_mask") if sides and sides[index] == "encoder" else tokens
        place = text_places[index] if text_places else (0, True)
        masks.append(patch_mask(inputs, feature) if place is None else tokens_mask(own, [feature], model, place))
    return masks


def patch_mask(inputs: Mapping[str, Any], feature: Tensor) -> Tensor | None:
    """Return the mask (B, N) of an image's patches, where a processor has padded them (SigLIP 2)."""
    mask = inputs.get("pixel_attention_mask")
    fits = isinstance(mask, Tensor) and feature.dim() == 3 and mask.shape == feature.shape[:2]
    return mask if fits else None


def base_model(model: nn.Module) -> nn.Module:
    """Return the model that PEFT or a compiler wraps, whose kind and signature count; any other model as it is."""
    wrapper: Any = getattr(model, "_orig_mod", model)
    return wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else wrapper


def config_fields(model: nn.Module) -> list[tuple[str, Any]]:
    """Return names and values of a model's configuration and of those within it; none without a configuration."""
    config: Any = getattr(model, "config", None)
    own = config.to_dict() if hasattr(config, "to_dict") else {}
    levels = [own, *(value for value in own.values() if isinstance(value, dict))]
    return [(str(name), value) for level in levels for name, value in level.items()]


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


def device_of(values: Iterable[Any]) -> torch.device | None:
    """Return where the first tensor among the values of a batch is; None without one."""
    return next((value.device for value in values if isinstance(value, Tensor)), None)


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


def token_targets(labels: Any, attention_mask: Any, shifted: bool, starts: Tensor | None = None) -> Tensor | None:
    """Return the (B, N) positions that are predicted: labeled ones, else those that are not padding, else None.

    With `shifted`, position n stands for the prediction of token n + 1, and there are N - 1 of them; nothing predicts
    the `starts` (B, N) of packed documents then.
    """
    if isinstance(labels, Tensor) and labels.dim() == 2:
        mask = labels != IGNORED
    elif isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        mask = attention_mask.bool()
    elif starts is not None:
        mask = ~starts if shifted else torch.ones_like(starts)
    else:
        return None
    return mask[:, 1:] if shifted else mask
