"""The proof that axes of weights are read rightly: with channels, heads and units in another order nothing changes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError
from .inputs import InputSelector, evaluating, on_device
from .outputs import first_tensor, is_encoder_decoder
from .units import Labels

# Outputs in another order agree to better than this share; a wrong axis changes far more.
SAME = 1e-3
# Groups that another order is tried of: all, and every second, fourth and eighth run of them, so that two that must
# have one order, such as the heads of all blocks, are told apart.
ROUNDS = 4


class OrderProof:
    """Tells of labels whether a model says the same when channels, heads and inner units come in another order."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any]):
        self._generator = torch.Generator().manual_seed(0)
        self._model = _with_noise(model, self._generator)
        self._state = {name: value.clone() for name, value in self._model.state_dict().items()}
        self._inputs = {name: value.float() if _is_floating(value) else value for name, value in inputs.items()}
        self._before = _output(self._model, self._inputs)

    @torch.no_grad()
    def __call__(self, labels: Labels) -> bool:
        """Whether nothing changes."""
        if self._before is None or not self._before.isfinite().all():
            return False
        groups = sorted({units.group for units in labels.values()})
        for turn in range(ROUNDS):
            moved = {group for place, group in enumerate(groups) if not turn or (place >> (turn - 1)) % 2 == 0}
            orders: dict[str, Tensor] = {}
            changed = dict(self._state)
            for (name, axis), units in labels.items():
                if units.group in moved:
                    order = orders.setdefault(units.group, _other_order(units.count, self._generator))
                    if len(order) != units.count:
                        return False
                    changed[name] = changed[name].index_select(axis, units.places(order).to(changed[name].device))
            self._model.load_state_dict(changed)
            after = _output(self._model, self._inputs)
            if after is None or not (self._before - after).abs().max() <= SAME * self._before.abs().max():
                return False
        return True


def _with_noise(model: PreTrainedModel, generator: torch.Generator) -> nn.Module:
    """Return a copy in evaluation mode and full precision, with weights of some size and no two alike."""
    made = copy.deepcopy(model).eval().float()
    for entry in made.state_dict(keep_vars=True).values():
        if not entry.is_floating_point():
            continue
        noise = torch.randn(entry.shape, generator=generator)
        if isinstance(entry, nn.Parameter):
            # Attention that is nearly even would not tell, and what grows from layer to layer is no number in the end.
            reads = entry[0].numel() if entry.dim() == 4 else max(entry.shape[-1], 1)
            noise *= reads**-0.5 if entry.dim() > 1 else 0.2
        else:
            noise = 0.2 * noise.abs()  # running variances stay positive
        entry.data.add_(noise.to(entry.device))
    return made


def _other_order(count: int, generator: torch.Generator) -> Tensor:
    """Return an order in which no unit keeps its place."""
    order = torch.randperm(count, generator=generator)
    moved = torch.empty_like(order)
    moved[order] = order.roll(1)
    return moved


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _output(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the logits of a model, or the first tensor of its output."""
    output = model(**inputs)
    logits = getattr(output, "logits", None)
    return first_tensor(output) if logits is None else logits


def example_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Return a small batch of the kind that a model reads; `InputError` where that is not known, or does not fit."""
    names = InputSelector(model).parameters
    made = _made_up(model, names)
    inputs = on_device(model, {name: value for name, value in made.items() if name in names})
    try:
        with torch.no_grad(), evaluating(model):
            model(**inputs)
    except Exception as error:  # whatever a model says of what was made up
        raise _unknown_inputs(model, names) from error
    return inputs


def _made_up(model: PreTrainedModel, names: list[str]) -> dict[str, Any]:
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    if "input_ids" in names:
        # Some heads read the last token that is not padding, others the one that ends a text.
        rows = 1 if getattr(config, "pad_token_id", None) is None else 2
        words = torch.randint(3, config.vocab_size, (rows, 8), generator=generator)
        ends = getattr(config, "eos_token_id", None)
        if isinstance(ends, int):
            words[words == ends] = 3
            words[:, -1] = ends
        made = {"input_ids": words, "attention_mask": torch.ones_like(words)}
        if (getattr(config, "type_vocab_size", None) or 0) > 1:
            made["token_type_ids"] = torch.ones_like(words).cumsum(1) // 5
        return made | ({"decoder_input_ids": words} if is_encoder_decoder(model) else {})
    if "pixel_values" in names:
        size = getattr(config, "image_size", 64)
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=generator)}
    if "input_values" in names:
        return {"input_values": torch.randn(2, 8000, generator=generator)}
    raise _unknown_inputs(model, names)


def _unknown_inputs(model: nn.Module, names: list[str]) -> InputError:
    return InputError(
        f"It is not known what {type(model).__name__} reads",
        received=f"inputs {', '.join(names)}",
        expected="texts of its vocabulary, images of its size, or sound",
        todo="pass batch=..., inputs of the kind that the model gets",
    )
