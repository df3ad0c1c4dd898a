"""Capturing the outputs of chosen layers in a forward pass."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import InputError, LayerNotFoundError, nearest
from ..models.outputs import accepts, first_tensor
from .layers import first_block, hidden_states

SHOWN_NAMES = 12

# The module of transformers' hooks that capture hidden states, and its marks on a model.
CAPTURING_MODULE = "transformers.utils.output_capturing"
CAPTURING_MARK = "_output_capturing_hooks_installed"
CAPTURING_FORWARD = "wrapped_forward"


class FeatureCapture:
    """Captures the outputs of chosen layers in a forward pass, by hidden states or by named modules.

    `layers` are hidden-state indices, or module names; None for all blocks, see `resolve`. `role` is for messages.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int] | Sequence[str] | None, role: str):
        self.role = role
        self.layers: list[int | str] | None = None if layers is None else list(layers)
        self.by_name = bool(self.layers) and self.layers is not None and isinstance(self.layers[0], str)
        if self.by_name:
            for name in self.names():
                self._find_module(model, name)

    def request(self, model: nn.Module) -> dict[str, Any]:
        """Return the keywords that make `model` return hidden states; empty when modules are named."""
        if self.by_name:
            return {}
        return {name: True for name in ("output_hidden_states", "return_dict") if accepts(model.forward, name)}

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Record the outputs of the named modules while the context is open; no hook survives it."""
        recorded: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name in self.names() if self.by_name else ():
                hook = partial(_record, recorded, name)
                hooks.enter_context(self._find_module(model, name).register_forward_hook(hook))
            yield recorded

    def collect(self, outputs: Any, recorded: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the chosen layers' outputs, in order, after the forward pass.

        Raises `InputError` when hidden states or a named module are missing, `LayerNotFoundError` for a wrong index.
        """
        if self.by_name:
            return [self._recorded(recorded, name) for name in self.names()]
        states = hidden_states(outputs)
        if states is None:
            fields = f"fields {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
            described = fields or f"type {type(outputs).__name__}"
            raise InputError(
                f"The {self.role} returns no hidden states",
                received=f"an output with {described}",
                expected="a model that takes output_hidden_states=True, or the names of the modules to use",
                todo=f"list module names (see model.named_modules()) in {self.role}_layers, or set feature_weight=0",
            )
        if self.layers is None:
            raise InputError(f"The {self.role}'s layers have not been resolved: call `resolve` first.")
        return [states[self._checked_index(index, len(states))] for index in self.layers]

    def resolve(self, model: nn.Module, outputs: Any) -> None:
        """Choose all blocks when no layers were given: every hidden state but the embedding or stem."""
        states = None if self.by_name else hidden_states(outputs)
        if states is None:
            return
        if self.layers is None:
            self.layers = list(range(first_block(states, getattr(model, "config", None)), len(states)))
            return
        self.layers = [self._checked_index(index, len(states)) for index in self.layers]
        if len(set(self.layers)) < len(self.layers):
            raise InputError(
                f"A {self.role} layer is named twice, from the front and from the end",
                received=f"{self.role}_layers that mean the hidden states {self.layers}",
                expected="every layer once",
                todo=f"leave one of them out of {self.role}_layers",
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
        raise InputError(
            f"Module `{name}` of the {self.role} gave no tensor in the forward pass",
            received="no call, or an output without a tensor",
            expected="a module that runs once in every forward pass and returns a tensor first",
            todo=f"name another module in {self.role}_layers",
        )


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


def _record(recorded: dict[str, Tensor], name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
    tensor = first_tensor(output)
    if tensor is not None:
        recorded[name] = tensor
