"""Where the tokens of a text lie among those of an image or a sound, found by changing one word."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models.outputs import base_model, config_fields, first_tensor


class TextPlace(NamedTuple):
    """Where a text begins among other tokens, and whether these count: not where their order is random (ViLT)."""

    start: int
    others_count: bool = True


def reads_more_than_text(inputs: Mapping[str, Any]) -> bool:
    """Whether a model is given a text with a mask, and beside it something else, such as an image."""
    others = (value for name, value in inputs.items() if not name.startswith("inputs_embeds"))
    dense = any(isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 2 for value in others)
    return dense and isinstance(inputs.get("input_ids"), Tensor) and isinstance(inputs.get("attention_mask"), Tensor)


@torch.no_grad()
def text_places(model: nn.Module, inputs: Mapping[str, Any], modules: Sequence[str]) -> list[TextPlace | None]:
    """Return where the text lies in each module's input; None where it gets none, or it is not known.

    A word is changed: where a module's input is another one then, there it lies. Behind attention all of a text's
    positions change, and then those of an image too: the place is that of the last module in front with as many
    positions. What changes by itself, between two equal passes, tells nothing.
    """
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    words = _words(ids, model)
    places = words.all(0).nonzero().flatten().tolist()
    if not places:
        return [None] * len(modules)
    place, changed = places[0], ids.clone()
    # By another word of the sample, where it has one.
    other = ids.where(words & (ids != ids[:, place : place + 1]), -1).max(1).values
    changed[:, place] = torch.where(other < 0, ids[:, place], other)
    seen = [_inputs_of(model, {**inputs, "input_ids": read}, modules) for read in (ids, ids, changed)]
    found: list[TextPlace | None] = []
    known: dict[int, TextPlace] = {}
    for name in modules:
        own, again, other = (entry.get(name) for entry in seen)
        if own is None or again is None or other is None or not own.shape == again.shape == other.shape:
            found.append(None)
            continue
        restless = (own != again).any(2).any(0)
        found_at = ((own != other).any(2).any(0) & ~restless).nonzero().flatten().tolist()
        count = own.shape[1]
        if len(found_at) == 1:
            known[count] = TextPlace(found_at[0] - place, not bool(restless.any()))
        elif found_at and found_at[-1] - found_at[0] + 1 == length:
            known[count] = TextPlace(found_at[0], not bool(restless.any()))
        found.append(known.get(count) if found_at else None)
    return found


def _words(ids: Tensor, model: nn.Module) -> Tensor:
    """Return which ids (B, N) are words: no places for an image, and no special tokens."""
    fields = config_fields(base_model(model))
    special = [value for name, value in fields if name.endswith(("token_id", "token_index"))]
    words = torch.ones_like(ids, dtype=torch.bool)
    for value in special:
        words &= ids != value if isinstance(value, int) else True
    return words


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
