"""Narrowing a model: fewer channels, attention heads and inner units, chosen by the size of their weights.

Which axes of weights run along the channels, the heads of an attention or the inner units of a block is found from the
configuration and from names, and proved before it is used: with channels, heads and units in another order, the model
must say the same.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError, InputError
from .cutting import check_kept_config
from .inputs import InputSelector
from .outputs import first_tensor, is_encoder_decoder
from .sizes import ConfigSize, Shapes, empty_like, find_axes, shapes_of

HEAD_WORDS = re.compile(r"heads?$")
QUERIES = {"query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin", "q", "k", "v"}
QUERIES |= {f"{name}_global" for name in ("query", "key", "value")}
FUSED = {"c_attn", "qkv", "qkv_proj", "query_key_value", "in_proj", "Wqkv"}
# Outputs in another order agree to better than this share; a wrong axis changes far more.
SAME = 1e-3


@dataclass(frozen=True)
class Units:
    """What an axis of a weight runs along: a `group` of units of `width` entries, all of them `repeats` times."""

    group: str
    width: int = 1
    repeats: int = 1

    def places(self, kept: Tensor, length: int) -> Tensor:
        """Return the places on an axis of that length which belong to some of the units."""
        own = (kept.unsqueeze(1) * self.width + torch.arange(self.width)).flatten()
        return torch.cat([own + turn * (length // self.repeats) for turn in range(self.repeats)])


Labels = dict[tuple[str, int], Units]


def narrow(model: PreTrainedModel, hidden_size: int, batch: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Return a new model of the same class with fewer channels; the given one stays as it is.

    Heads keep their width, and inner units their ratio to the channels. Raises `ConfigurationError` for a number of
    channels that the heads do not divide, `InputError` for a family whose axes are not known.
    """
    axes = find_axes(model)
    hidden = max(axes, key=lambda size: len(axes[size]), default=None)
    # Most weights run along the channels; else the real number cannot be changed alone.
    if hidden is None or hidden.index is not None or 2 * len(axes[hidden]) < len(shapes_of(model)):
        raise _unknown(model, "its configuration has no single number of channels")
    config = _narrower(model, axes, hidden, hidden_size)
    made = empty_like(model, config)
    if made is None:
        raise _unknown(model, f"its configuration refuses {hidden}={hidden_size}")
    theirs, own = shapes_of(model), shapes_of(made)
    inputs = dict(batch) if batch is not None else example_inputs(model)
    # One projection for queries, keys and values gives them one behind the other, or head by head.
    layouts = [_labels(model, axes, hidden, own, by_head=by_head) for by_head in (False, True)]
    labels = next((found for found in layouts if _keeps_order(model, found, inputs)), None)
    if labels is None:
        raise _unknown(model, "its outputs depend on the order of channels, heads or inner units")
    state, sliced = model.state_dict(), {}
    scores = _scores(state, labels)
    for name, value in state.items():
        for axis, length in enumerate(value.shape):
            if own[name][axis] != theirs[name][axis]:
                units = labels[name, axis]
                count = own[name][axis] // (units.width * units.repeats)
                kept = scores[units.group].topk(count).indices.sort().values
                value = value.index_select(axis, units.places(kept, length).to(value.device))
        sliced[name] = value
    kind: Any = type(model)
    student = kind(config).to(dtype=model.dtype, device=model.device)
    check_kept_config(student)
    student.load_state_dict(sliced)
    try:
        with torch.no_grad():
            student.eval()(**inputs)
    except RuntimeError as error:
        raise _unknown(model, "some part of it keeps the number of channels") from error
    return student.train(model.training)


def _narrower(model: PreTrainedModel, axes: Mapping[ConfigSize, Any], hidden: ConfigSize, width: int) -> Any:
    """Return a configuration with that many channels; heads go with them where their width follows from these."""
    config: Any = copy.deepcopy(model.config)
    fields = ((name, value) for name, value in config.to_dict().items() if HEAD_WORDS.search(name))
    heads = [ConfigSize(name, None, value) for name, value in fields if isinstance(value, int) and value > 0]
    # Heads of a width of their own (head_dim, d_kv) stay; others share the channels out among them.
    if not any(size in axes for size in heads):
        for size in heads:
            if hidden.value % size.value or width % (hidden.value // size.value):
                step = hidden.value // size.value
                raise ConfigurationError(
                    "The heads of the teacher do not divide this number of channels",
                    received=f"hidden_size={width}, with {size.value} heads of {step} channels",
                    expected=f"a multiple of {step}, less than {hidden.value}",
                    todo=f"choose {max(step, width // step * step)}, for example",
                )
            size.put(config, size.value * width // hidden.value)
    for size in axes:
        if size != hidden and size not in heads and not HEAD_WORDS.search(size.field):
            size.put(config, max(1, size.value * width // hidden.value))
    hidden.put(config, width)
    return config


def _labels(
    model: nn.Module, axes: Mapping[ConfigSize, Any], hidden: ConfigSize, own: Shapes, *, by_head: bool
) -> Labels:
    """Return what each axis runs along that is shorter in the student; `by_head`: the layout of fused projections."""
    labels: Labels = {}
    config: Any = model.config
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "encoder_attention_heads", None)
    if not isinstance(heads, int):
        raise _unknown(model, "its configuration has no single number of heads")
    head_width = max(hidden.value // heads, 1)
    for name, shape in shapes_of(model).items():
        for axis, length in enumerate(shape):
            if own[name][axis] == length:
                continue
            grows = axis in axes[hidden].get(name, ())
            attention, is_output = _attention_of(model, name, axis)
            if grows and attention and is_output is not None and length % hidden.value == 0:
                times = length // hidden.value
                width, repeats = (times * head_width, 1) if by_head else (head_width, times)
                labels[name, axis] = Units(f"heads of {attention}", width, repeats)
                continue
            block = re.match(r".*\.\d+(?=\.)", name)
            # Outside of the blocks there may be several vectors of channels side by side.
            if grows and (length == hidden.value or (block is None and length % hidden.value == 0)):
                labels[name, axis] = Units("channels", repeats=length // hidden.value)
            else:
                labels[name, axis] = Units(f"inner units of {block.group() if block else 'the model'}")
    return labels


def _attention_of(model: nn.Module, name: str, axis: int) -> tuple[str, bool | None]:
    """Return the attention that a weight is part of, and whether an axis of it runs along its heads.

    True for what a query, key or value gives, False for what the output projection takes, None for neither.
    """
    path, leaf = name.rpartition(".")[0], name.rpartition(".")[0].rpartition(".")[2]
    parts = path.split(".")
    inside = next((place for place, part in enumerate(parts) if "att" in part.lower()), None)
    if inside is None:
        return "", None
    attention = ".".join(parts[: inside + 1])
    turned = type(model.get_submodule(path)).__name__ == "Conv1D"
    gives = axis == (1 if turned and not name.endswith("bias") else 0)
    if leaf in QUERIES or leaf in FUSED:
        return attention, True if gives else None
    linear = turned or isinstance(model.get_submodule(path), nn.Linear)
    return attention, False if linear and not gives and not name.endswith("bias") else None


def _scores(state: Mapping[str, Tensor], labels: Labels) -> dict[str, Tensor]:
    """Return the importance of each unit of each group: its share of the squares of the weights along it, summed."""
    scores: dict[str, Tensor] = {}
    for (name, axis), units in labels.items():
        squares = state[name].detach().float().square().movedim(axis, 0)
        squares = squares.reshape(len(squares), -1).sum(1).cpu()
        each = squares.view(units.repeats, -1, units.width).sum((0, 2))
        share = each / each.sum().clamp(min=1e-12)
        scores[units.group] = scores[units.group] + share if units.group in scores else share
    return scores


@torch.no_grad()
def _keeps_order(model: PreTrainedModel, labels: Labels, inputs: Mapping[str, Any]) -> bool:
    """Whether a model says the same when channels, heads and inner units come in another order."""
    generator, orders = torch.Generator().manual_seed(0), dict[str, Tensor]()
    first = copy.deepcopy(model).eval().float()
    for entry in first.parameters():
        # Weights of some size: attention that is nearly even would not tell.
        noise = torch.randn(entry.shape, generator=generator) / max(entry.shape[-1], 1) ** 0.5
        entry.add_(noise.to(entry.device) * (1.0 if entry.dim() > 1 else 0.2))
    second = copy.deepcopy(first)
    state = second.state_dict()
    for (name, axis), units in labels.items():
        length = state[name].shape[axis]
        count = length // (units.width * units.repeats)
        order = orders.setdefault(units.group, torch.randperm(count, generator=generator))
        if len(order) != count:
            return False
        state[name] = state[name].index_select(axis, units.places(order, length).to(state[name].device))
    second.load_state_dict(state)
    before, after = (first_tensor(_plain(entry(**inputs))) for entry in (first, second))
    if before is None or after is None or not before.isfinite().all():
        return False
    return bool((before - after).abs().max() <= SAME * before.abs().max())


def _plain(output: Any) -> Any:
    """Return the logits of an output, or the output itself."""
    logits = getattr(output, "logits", None)
    return output if logits is None else logits


def example_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Return a small batch of the kind that a model reads; `InputError` where that is not known."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    names = InputSelector(model).parameters
    if "input_ids" in names:
        words = torch.randint(3, config.vocab_size, (2, 8), generator=generator)
        made = {"input_ids": words, "attention_mask": torch.ones_like(words)}
        made |= {"decoder_input_ids": words} if is_encoder_decoder(model) else {}
    elif "pixel_values" in names:
        size = getattr(config, "image_size", 64)
        height, width = (size, size) if isinstance(size, int) else size
        made = {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=generator)}
    elif "input_values" in names:
        made = {"input_values": torch.randn(2, 8000, generator=generator)}
    else:
        raise InputError(
            f"It is not known what {type(model).__name__} reads",
            received=f"inputs {', '.join(names)}",
            expected="input_ids, pixel_values or input_values",
            todo="pass batch=...",
        )
    return {name: value.to(model.device) for name, value in made.items() if name in names}


def _unknown(model: nn.Module, why: str) -> InputError:
    return InputError(
        f"{type(model).__name__} cannot be narrowed: {why}",
        received=f"hidden_size for a {type(getattr(model, 'config', None)).__name__}",
        expected="a family whose channels, heads and inner units are known",
        todo="cut its depth (num_layers), or make a narrower student from a configuration of your own",
    )
