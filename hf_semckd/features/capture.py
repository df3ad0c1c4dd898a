"""Capturing the outputs of chosen layers in a forward pass."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, LayerNotFoundError, nearest
from ..models.outputs import accepts, config_fields, first_tensor
from .layers import FeatureSpec, describe, hidden_states
from .modalities import TextPlace, reads_more_than_text, text_places
from .trace import ForwardTrace, find_blocks, find_layers, towers, with_random_images

SHOWN_NAMES = 12

# The module of transformers' hooks that capture hidden states, and its marks on a model.
CAPTURING_MODULE = "transformers.utils.output_capturing"
CAPTURING_MARK = "_output_capturing_hooks_installed"
CAPTURING_FORWARD = "wrapped_forward"


@dataclass(frozen=True)
class Captured:
    """What one forward pass of a small batch gave: the model's output, its chosen layers, and the trace."""

    outputs: Any
    names: list[str]
    features: list[Tensor]
    trace: ForwardTrace
    sides: list[str]

    def describe(self, *, of_image: bool) -> list[FeatureSpec]:
        """Describe the layers; `of_image` tells whether tokens can be those of an image."""
        layers = zip(self.features, self.names, strict=True)
        specs = [describe(feature, name, self.trace, of_image=of_image) for feature, name in layers]
        return [replace(spec, side=side) for spec, side in zip(specs, self.sides or [""] * len(specs), strict=True)]


class FeatureCapture:
    """Captures the outputs of chosen layers in a forward pass, by hidden states or by named modules.

    `layers` are hidden-state indices, or module names; None for all blocks, see `resolve`. `role` is for messages.
    `modules` names the modules that made the layers, once they were found. With `both_sides`, all blocks of an
    encoder-decoder are those of its encoder and its decoder; `sides` tells which is which, and which of several towers
    a layer is in; it is empty elsewhere. `text_places` tells where the text lies among the positions of each layer,
    None for a layer without any; it is empty where a model reads nothing but text.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[int] | Sequence[str] | None, role: str, *, both_sides: bool = False
    ):
        self.role, self.both_sides = role, both_sides
        self.sides: list[str] = []
        self.text_places: list[TextPlace | None] = []
        # The dimensions of each layer's output in the usual order: channels are the second of four, the last of three.
        # Empty where they are in it.
        self._orders: list[tuple[int, ...]] = []
        self._of_image = False
        self.layers: list[int | str] | None = None if layers is None else list(layers)
        self.modules: list[str] = []
        # What stands for a block that a model in training leaves out now and then; None where every block always runs.
        self._before_blocks: str | None = None
        wanted = ("output_hidden_states", "return_dict")
        self._request = {name: True for name in wanted if accepts(model.forward, name)}
        if self.by_name:
            for name in self.names():
                self._find_module(model, name)

    @property
    def by_name(self) -> bool:
        """Whether the layers are recorded by hooks on modules, and not taken from the hidden states."""
        return bool(self.layers) and self.layers is not None and isinstance(self.layers[0], str)

    def request(self) -> dict[str, Any]:
        """Return the keywords that make the model return hidden states; empty when modules are named."""
        return {} if self.by_name else dict(self._request)

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Record the outputs of the named modules while the context is open; no hook survives it.

        Raises `InputError` for a module whose output gradient checkpointing cuts off from the gradient.
        """
        recorded: dict[str, Tensor] = {}
        cut_off: set[str] | None = set() if torch.is_grad_enabled() else None
        with ExitStack() as hooks:
            for name in (*self.names(), *filter(None, [self._before_blocks])) if self.by_name else ():
                hook = partial(_record, recorded, cut_off, name)
                hooks.enter_context(self._find_module(model, name).register_forward_hook(hook))
            yield recorded
        # The output of a whole checkpointed layer has a gradient again by now.
        for name in sorted(cut_off or ()):
            if not recorded[name].requires_grad:
                raise InputError(
                    f"No gradient reaches module `{name}` of the {self.role}, so nothing could be learned from it",
                    received="a module inside a checkpointed layer with use_reentrant=True, or under torch.no_grad()",
                    expected="whole layers, or checkpointing that keeps what happens inside them",
                    todo="set gradient_checkpointing_kwargs={'use_reentrant': False}, or name whole layers in "
                    f"{self.role}_layers",
                )

    def collect(self, outputs: Any, recorded: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the chosen layers' outputs, in order, after the forward pass.

        Raises `InputError` when hidden states or a named module are missing, `LayerNotFoundError` for a wrong index.
        """
        if self.by_name:
            return self._laid_out([self._recorded(recorded, name) for name in self.names()])
        states = hidden_states(outputs)
        if states is None:
            fields = f"fields {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
            described = fields or f"type {type(outputs).__name__}"
            raise InputError(
                f"The {self.role} returns no hidden states",
                received=f"an output with {described}",
                expected="a model that takes output_hidden_states=True, or the names of the modules to use",
                todo=f"list module names (see model.named_modules()) in {self.role}_layers, or set feature_weight=0; "
                "hf_semckd.inspect_models(student, teacher, batch) shows what was found",
            )
        if self.layers is None:
            raise InputError(f"The {self.role}'s layers have not been resolved: call `resolve` first.")
        return self._laid_out([states[self._checked_index(index, len(states))] for index in self.layers])

    @property
    def known_by_name(self) -> bool:
        """Whether the layers' names tell all: no sides, no text among other tokens, channels in the usual place."""
        return not self.sides and not self.text_places and not any(self._orders)

    def _laid_out(self, features: list[Tensor]) -> list[Tensor]:
        """Return features (B, C, H, W) or (B, N, C) of those in another order; what is no image becomes tokens."""
        for index, order in enumerate(self._orders):
            if order:
                ordered = features[index].permute(order)
                image = self._of_image or ordered.dim() == 3
                features[index] = ordered if image else ordered.flatten(2).transpose(1, 2)
        return features

    def find(self, model: nn.Module, inputs: Mapping[str, Any]) -> Captured:
        """Choose the layers (see `resolve`) by a batch with random images, and return what the batch itself gives."""
        with ForwardTrace.recording(model) as trace:
            outputs = model(**with_random_images(inputs), **self.request())
        self.resolve(model, outputs, trace)
        with self.recording(model) as recorded:
            outputs = model(**inputs, **self.request())
        features = self.collect(outputs, recorded)
        self._check_samples(features, inputs)
        given_as_maps = not self.by_name and getattr(outputs, "reshaped_hidden_states", None) is not None
        if self.modules and not any(self._orders) and not given_as_maps:
            self._of_image = any(isinstance(value, Tensor) and value.dim() == 4 for value in inputs.values())
            pairs = zip(self.modules, features, strict=True)
            self._orders = [_order(model, name, feature) for name, feature in pairs]
            features = self._laid_out(features)
        if reads_more_than_text(inputs) and self.modules:
            self.text_places = text_places(model, inputs, self.modules)
        return Captured(outputs, self.names(), features, trace, self.sides)

    def resolve(self, model: nn.Module, outputs: Any, trace: ForwardTrace) -> None:
        """Choose all blocks when no layers were given, by a forward pass and its trace; see `trace.find_layers`."""
        states = None if self.by_name else hidden_states(outputs)
        if self.layers is None:
            self._find_blocks(model, outputs, states, trace)
            self._add_encoder(outputs, trace)
        elif states is not None:
            self.layers = [self._checked_index(index, len(states)) for index in self.layers]
            if len(set(self.layers)) < len(self.layers):
                raise InputError(
                    f"A {self.role} layer is named twice, from the front and from the end",
                    received=f"{self.role}_layers that mean the hidden states {self.layers}",
                    expected="every layer once",
                    todo=f"leave one of them out of {self.role}_layers",
                )
        if self.by_name:
            self.modules = self.names()
        elif states is not None and not self.modules:
            # The outermost module: that of the block, and not of its last sublayer.
            made = [trace.makers(states[int(index)]) for index in self.layers or ()]
            self.modules = [names[-1] if names else "" for names in made]

    def _find_blocks(
        self, model: nn.Module, outputs: Any, states: Sequence[Tensor] | None, trace: ForwardTrace
    ) -> None:
        logits = getattr(outputs, "logits", None)
        if isinstance(logits, Tensor) and logits.dim() == 3:
            # States of another part than the head's (the image of BLIP, say) teach that part alone.
            blocks = trace.blocks_of_length(logits.shape[1])
            if blocks and all(state.dim() != 3 or state.shape[1] != logits.shape[1] for state in states or ()):
                self.layers = list(blocks)
                return
        if states is None:
            self.layers = list(find_blocks(trace)) or None
            self.sides = towers(self.names())
            return
        found = find_layers(states, trace)
        if found is None:
            # Padded or cut on the way: an embedding comes first, unless the states are maps.
            self.layers = list(range(1 if len(states) > 1 and states[0].dim() != 4 else 0, len(states)))
            return
        self.modules = found.modules
        self.layers = list(found.modules if found.states is None else found.states)
        if self.role == "student" and drops_layers(model) and len({*found.modules}) == len(found.modules):
            self.layers = list(found.modules)
            self._before_blocks = next(iter(trace.makers(states[0])), None)

    def _add_encoder(self, outputs: Any, trace: ForwardTrace) -> None:
        """Put an encoder's blocks in front of the decoder's that were found, if both have names."""
        sides = [getattr(outputs, f"{side}_hidden_states", None) or () for side in ("encoder", "decoder")]
        states = [state for side in sides for state in side]
        if not self.both_sides or not all(sides) or not all(isinstance(state, Tensor) for state in states):
            return
        encoder, decoder = find_layers(sides[0], trace), list(self.modules)
        named = [*(() if encoder is None else encoder.modules), *decoder]
        # Some blocks return another layout than the model (FSMT): a hook would record that.
        if encoder is not None and decoder and all(trace.returns(name, states) for name in named):
            self.layers = [*encoder.modules, *decoder]
            self.sides = ["encoder"] * len(encoder.modules) + ["decoder"] * len(decoder)

    def _check_samples(self, features: Sequence[Tensor], inputs: Mapping[str, Any]) -> None:
        """Refuse layers whose first dimension is not that of the samples, or of several rows for each."""
        samples = {len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()}
        for name, feature in zip(self.names(), features, strict=True):
            if samples and not any(len(feature) % count == 0 for count in samples):
                raise InputError(
                    f"Layer `{name}` of the {self.role} does not begin with the samples",
                    received=f"an output {tuple(feature.shape)} for {max(samples)} samples",
                    expected="(samples, tokens, channels), (samples, channels, height, width) or (samples, channels)",
                    todo=f"use batch_first=True in the {self.role}, or name other modules in {self.role}_layers",
                )

    def names(self) -> list[str]:
        """Return the chosen layers as text, for logs and pictures."""
        return [str(layer) for layer in self.layers or ()]

    def _checked_index(self, layer: int | str, count: int) -> int:
        index = int(layer)
        position = index + count if index < 0 else index
        if not 0 <= position < count:
            raise LayerNotFoundError(
                f"The {self.role} has no hidden state {index}",
                received=f"{self.role}_layers with {index}",
                expected=f"indices from 0 (embedding or stem) to {count - 1}, or negative ones from the end",
                todo=f"the nearest is {max(0, min(position, count - 1))}; leave {self.role}_layers out for all blocks",
            )
        return position

    def _find_module(self, model: nn.Module, name: str) -> nn.Module:
        modules = dict(model.named_modules())
        if name in modules and name:
            return modules[name]
        names = [known for known in modules if known]
        close = nearest(name, names) or names[:SHOWN_NAMES]
        raise LayerNotFoundError(
            f"The {self.role} has no module `{name}`",
            received=f"{self.role}_layers with {name!r}",
            expected=f"a name from {self.role}.named_modules(), such as {', '.join(map(repr, close))}",
            todo=f"correct the name, or leave {self.role}_layers out to use all blocks",
        )

    def _recorded(self, recorded: Mapping[str, Tensor], name: str) -> Tensor:
        if name in recorded:
            return recorded[name]
        if self._before_blocks is not None and self._before_blocks in recorded:
            # A block that is left out passes its input on. Detached, it teaches nothing in this step.
            earlier = [self._before_blocks, *self.names()[: self.names().index(name)]]
            return next(recorded[other] for other in reversed(earlier) if other in recorded).detach()
        raise InputError(
            f"Module `{name}` of the {self.role} gave no tensor in the forward pass",
            received="no call, or an output without a tensor",
            expected="a module that runs once in every forward pass and returns a tensor first",
            todo=f"name another module in {self.role}_layers",
        )


def _order(model: nn.Module, name: str, feature: Tensor) -> tuple[int, ...]:
    """Return the dimensions of a module's output in the usual order; empty where they are in it.

    Linear layers work on the last dimension of four, one-dimensional convolutions on the second of three.
    """
    if feature.dim() < 3 or not name:
        return ()
    parts = list(model.get_submodule(name).modules())
    linears = [part for part in parts if isinstance(part, nn.Linear)]
    if feature.dim() == 4:
        widths = {width for part in linears for width in (part.in_features, part.out_features)}
        convolves = any(isinstance(part, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)) for part in parts)
        return (0, 3, 1, 2) if not convolves and feature.shape[3] in widths else ()
    widths = {part.out_channels for part in parts if isinstance(part, nn.Conv1d)}
    return (0, 2, 1) if not linears and feature.shape[1] in widths and feature.shape[2] not in widths else ()


def drops_layers(model: nn.Module) -> bool:
    """Whether a model in training leaves blocks out at random (LayerDrop), by its configuration and those within."""
    shares = [value for name, value in config_fields(model) if name.endswith("layerdrop")]
    return any(isinstance(share, (int, float)) and share > 0 for share in shares)


def remove_capturing_traces(model: nn.Module) -> None:
    """Remove the traces that transformers leaves on a model that returned hidden states; it restores them when needed.

    From 5.2x these are hooks that cannot be pickled, before that forwards bound to the layers.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", None) == CAPTURING_MODULE:
                del module._forward_hooks[key]
        module.__dict__.pop(CAPTURING_MARK, None)
        bound = module.__dict__.get("forward")
        own = getattr(bound, "__func__", None) is type(module).forward
        # Left by a failed forward, or put back as an attribute equal to the class's.
        if own or getattr(getattr(bound, "__code__", None), "co_name", None) == CAPTURING_FORWARD:
            del module.__dict__["forward"]


def _record(
    recorded: dict[str, Tensor], cut_off: set[str] | None, name: str, _module: nn.Module, _inputs: Any, output: Any
) -> None:
    tensor = first_tensor(output)
    if tensor is not None:
        recorded[name] = tensor
        if cut_off is not None and not torch.is_grad_enabled():
            cut_off.add(name)
