"""What the output of a layer is, which layers take part, and how their outputs are captured."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from .errors import InputError, LayerNotFoundError, message, nearest

# In the order in which they are looked for: Swin keeps maps beside the tokens, encoder-decoders two sequences.
HIDDEN_STATE_FIELDS = ("reshaped_hidden_states", "hidden_states", "decoder_hidden_states")
SHOWN_NAMES = 12
# Where transformers keeps the hooks by which it captures hidden states, and its note that they are in place.
CAPTURING_MODULE = "transformers.utils.output_capturing"
CAPTURING_MARK = "_output_capturing_hooks_installed"
CAPTURING_FORWARD = "wrapped_forward"


@dataclass(frozen=True)
class FeatureSpec:
    """The kind and size of one layer's output, without the batch dimension.

    Attributes:
        name: How the layer is called in messages, logs and pictures.
        kind: `map` for (B, C, H, W), `tokens` for (B, N, C).
        channels: C.
        length: Number of positions: N, or H * W, as seen when it was described; sequences may vary.
        grid: (H, W) of a map, or of the image patches among the tokens; None for text.
        prefix: Number of tokens in front of the patches (CLS, distillation and register tokens).
    """

    name: str
    kind: Literal["map", "tokens"]
    channels: int
    length: int
    grid: tuple[int, int] | None = None
    prefix: int = 0

    @classmethod
    def from_shape(cls, shape: Sequence[int], name: str) -> FeatureSpec:
        """Describe a layer from a shape without the batch dimension: (C, H, W) is a map, (N, C) are tokens.

        Raises:
            InputError: For any other number of dimensions.
        """
        if len(shape) == 3:
            channels, height, width = shape
            return cls(name, "map", channels, height * width, (height, width))
        if len(shape) == 2:
            return cls(name, "tokens", shape[1], shape[0])
        raise InputError(
            message(
                f"The output of layer `{name}` is neither a map nor a sequence",
                received=f"shape {tuple(shape)} without the batch dimension",
                expected="(channels, height, width) or (tokens, channels)",
                todo="choose other layers with student_layers / teacher_layers",
            )
        )


class FeatureCapture:
    """Takes the outputs of chosen layers out of a forward pass, by hidden states or by named modules.

    Args:
        model: The model to look into.
        layers: Hidden-state indices, or module names; None finds all blocks in the first outputs described.
        role: `student` or `teacher`, for messages.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int] | Sequence[str] | None, role: str):
        self.role = role
        self.layers: list[int | str] | None = None if layers is None else list(layers)
        self.by_name = bool(self.layers) and self.layers is not None and isinstance(self.layers[0], str)
        if self.by_name:
            for name in self.layers or ():
                self._find_module(model, str(name))

    def request(self, model: nn.Module) -> dict[str, Any]:
        """Return the keywords that make `model` return what is needed; empty when modules are named."""
        if self.by_name:
            return {}
        return {name: True for name in ("output_hidden_states", "return_dict") if accepts(model.forward, name)}

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Record the outputs of the named modules while the context is open; no hook survives it."""
        recorded: dict[str, Tensor] = {}
        handles = []
        try:
            if self.by_name:
                for name in self.layers or ():
                    module = self._find_module(model, str(name))
                    handles.append(module.register_forward_hook(_recorder(recorded, str(name))))
            yield recorded
        finally:
            for handle in handles:
                handle.remove()

    def collect(self, outputs: Any, recorded: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the chosen layers' outputs, in order, after the forward pass.

        Raises:
            InputError: When the model returned no hidden states, or a named module did not run.
            LayerNotFoundError: When an index is outside the hidden states.
        """
        if self.by_name:
            return [self._recorded(recorded, str(name)) for name in self.layers or ()]
        states = hidden_states(outputs)
        if states is None:
            raise InputError(
                message(
                    f"The {self.role} returns no hidden states",
                    received=f"an output with {_describe_output(outputs)}",
                    expected="a model that takes output_hidden_states=True, or the names of the modules to use",
                    todo=f"list module names (see model.named_modules()) in {self.role}_layers, or set "
                    "feature_weight=0",
                )
            )
        if self.layers is None:
            raise InputError(f"The {self.role}'s layers have not been resolved: call `resolve` first.")
        return [states[self._checked_index(index, len(states))] for index in self.layers]

    def resolve(self, model: nn.Module, outputs: Any) -> None:
        """Choose all blocks when no layers were given: every hidden state but the embedding or stem."""
        if self.layers is None:
            states = hidden_states(outputs)
            if states is not None:
                self.layers = list(range(_first_block(states, getattr(model, "config", None)), len(states)))
        elif not self.by_name:
            states = hidden_states(outputs)
            if states is not None:
                self.layers = [self._checked_index(index, len(states)) for index in self.layers]
                self._check_distinct()

    def names(self) -> list[str]:
        """Return the chosen layers as text, for logs and pictures."""
        return [str(layer) for layer in self.layers or ()]

    def _checked_index(self, layer: int | str, count: int) -> int:
        index = int(layer)
        position = index + count if index < 0 else index
        if not 0 <= position < count:
            raise LayerNotFoundError(
                message(
                    f"The {self.role} has no hidden state {index}",
                    received=f"{self.role}_layers with {index}",
                    expected=f"indices from 0 (embedding or stem) to {count - 1}, or negative ones from the end",
                    todo=f"the nearest is {max(0, min(position, count - 1))}; leave {self.role}_layers out "
                    "for all blocks",
                )
            )
        return position

    def _check_distinct(self) -> None:
        layers = self.layers or []
        if len(set(layers)) < len(layers):
            raise InputError(
                message(
                    f"A {self.role} layer is named twice, from the front and from the end",
                    received=f"{self.role}_layers that mean the hidden states {layers}",
                    expected="every layer once",
                    todo=f"leave one of them out of {self.role}_layers",
                )
            )

    def _find_module(self, model: nn.Module, name: str) -> nn.Module:
        modules = dict(model.named_modules())
        if name in modules and name:
            return modules[name]
        names = [known for known in modules if known]
        close = nearest(name, names) or names[:SHOWN_NAMES]
        raise LayerNotFoundError(
            message(
                f"The {self.role} has no module `{name}`",
                received=f"{self.role}_layers with {name!r}",
                expected=f"a name from {self.role}.named_modules(), such as {', '.join(map(repr, close))}",
                todo=f"correct the name, or leave {self.role}_layers out to use all blocks",
            )
        )

    def _recorded(self, recorded: Mapping[str, Tensor], name: str) -> Tensor:
        if name in recorded:
            return recorded[name]
        raise InputError(
            message(
                f"Module `{name}` of the {self.role} gave no tensor in the forward pass",
                received="no call, or an output without a tensor",
                expected="a module that runs once in every forward pass and returns a tensor first",
                todo=f"name another module in {self.role}_layers",
            )
        )


def hidden_states(outputs: Any) -> tuple[Tensor, ...] | None:
    """Return the hidden states in a model's output, or None; maps are preferred where a model gives both."""
    for field in HIDDEN_STATE_FIELDS:
        states = outputs.get(field) if isinstance(outputs, Mapping) else getattr(outputs, field, None)
        if states is not None:
            return tuple(states)
    return None


def without_hidden_states(outputs: Any) -> Any:
    """Return a copy of a model's output without the hidden states, which nobody downstream asked for."""
    if not isinstance(outputs, Mapping):
        return outputs
    dropped = (*HIDDEN_STATE_FIELDS, "encoder_hidden_states")
    return type(outputs)(**{key: value for key, value in outputs.items() if key not in dropped})


def remove_capturing_traces(model: nn.Module) -> None:
    """Take off what transformers leaves on a model that was asked for hidden states; it comes back when needed.

    From 5.2x these are hooks that cannot be pickled, before that forwards bound to the layers.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", None) == CAPTURING_MODULE:
                del module._forward_hooks[key]
        module.__dict__.pop(CAPTURING_MARK, None)
        bound = module.__dict__.get("forward")
        own = getattr(bound, "__func__", None) is type(module).forward
        # Left by a failed forward, or put back as an attribute that says what the class says.
        if own or getattr(getattr(bound, "__code__", None), "co_name", None) == CAPTURING_FORWARD:
            del module.__dict__["forward"]


def describe(feature: Tensor, name: str, model: nn.Module, inputs: Mapping[str, Any]) -> FeatureSpec:
    """Describe one captured output; for image tokens, find the grid of patches and the tokens in front of it.

    Args:
        feature: (B, C, H, W), (B, N, C) or (B, C).
        name: The layer's name.
        model: Its config may tell the patch size.
        inputs: What the model was given; a 4-D tensor among them is the image batch.
    """
    if feature.dim() == 2:
        return FeatureSpec(name, "tokens", feature.shape[1], 1)
    spec = FeatureSpec.from_shape(tuple(feature.shape[1:]), name)
    images = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim() == 4]
    if spec.kind == "map" or not images:
        return spec
    grid = _patch_grid(getattr(model, "config", None), (images[0].shape[-2], images[0].shape[-1]), spec.length)
    if grid is None:
        return spec
    return FeatureSpec(name, "tokens", spec.channels, spec.length, grid, spec.length - grid[0] * grid[1])


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has an encoder and a decoder, so that its outputs follow the labels too."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def accepts(function: Any, name: str) -> bool:
    """Whether a function can be called with keyword `name`, by its signature or by taking any keyword."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values())


def _first_block(states: tuple[Tensor, ...], config: Any) -> int:
    """Return 1 when the first hidden state is an embedding or a stem, 0 when it is a block already."""
    if len(states) == 1:
        return 0
    if states[0].dim() != 4:
        return 1
    stages = getattr(config, "depths", None)
    return 1 if stages is not None and len(states) == len(stages) + 1 else 0


def _patch_grid(config: Any, image: tuple[int, int], length: int) -> tuple[int, int] | None:
    for owner in (config, getattr(config, "vision_config", None)):
        patch = getattr(owner, "patch_size", None)
        if isinstance(patch, int):
            patch = (patch, patch)
        if isinstance(patch, (tuple, list)) and len(patch) == 2:
            grid = (image[0] // patch[0], image[1] // patch[1])
            if 0 < grid[0] * grid[1] <= length:
                return grid
    for prefix in (0, 1):
        side = math.isqrt(max(length - prefix, 0))
        if side > 0 and side * side == length - prefix:
            return (side, side)
    return None


def _recorder(recorded: dict[str, Tensor], name: str) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            recorded[name] = tensor

    return hook


def first_tensor(output: Any) -> Tensor | None:
    """Return a module's output, or the first tensor in it, which is its hidden state; None when there is none."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


def _describe_output(outputs: Any) -> str:
    if isinstance(outputs, Mapping):
        return f"fields {', '.join(map(str, outputs))}"
    return f"type {type(outputs).__name__}"
