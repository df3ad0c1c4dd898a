"""Where the tokens of a text lie among those of an image or a sound, found by changing one word."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.outputs import first_tensor


def reads_more_than_text(inputs: Mapping[str, Any]) -> bool:
    """Whether a model is given a text with a mask, and beside it something else, such as an image."""
    others = (value for name, value in inputs.items() if not name.startswith("inputs_embeds"))
    dense = any(isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 2 for value in others)
    return dense and isinstance(inputs.get("input_ids"), Tensor) and isinstance(inputs.get("attention_mask"), Tensor)


@torch.no_grad()
def text_starts(model: nn.Module, inputs: Mapping[str, Any], modules: Sequence[str]) -> list[int | None]:
    """Return at which position of each module's input the text begins; None for a module that gets no text.

    The first word is changed: where a module's input is another one then, there the text begins. Behind attention
    other positions change too, and the place is that of the last module in front with as many positions.
    """
    ids = inputs["input_ids"]
    changed = ids.clone()
    changed[:, 0] = torch.where(ids[:, 0] == ids[:, -1], ids[:, 1], ids[:, -1])
    first, second = (_inputs_of(model, {**inputs, "input_ids": words}, modules) for words in (ids, changed))
    starts: list[int | None] = []
    known: dict[int, int] = {}
    for name in modules:
        own, other = first.get(name), second.get(name)
        if own is None or other is None or own.shape != other.shape or torch.equal(own, other):
            starts.append(None)
            continue
        places = (own != other).any(2).any(0).nonzero().flatten().tolist()
        if len(places) == 1:
            known[own.shape[1]] = places[0]
        starts.append(known.get(own.shape[1], 0))
    return starts


def _inputs_of(model: nn.Module, inputs: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Tensor]:
    """Return the first sequence (B, N, C) that each module is given."""
    seen: dict[str, Tensor] = {}

    def note(name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        tensor = first_tensor((*args, *kwargs.values()))
        if tensor is not None and tensor.dim() == 3:
            seen.setdefault(name, tensor)

    with ExitStack() as hooks:
        for name in {*modules} - {""}:
            hook = model.get_submodule(name).register_forward_pre_hook(partial(note, name), with_kwargs=True)
            hooks.enter_context(hook)
        model(**inputs)
    return seen
