"""Leaves a frozen model's forward after the last layer that is needed, where that gives the very same features."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .features import FeatureCapture, first_tensor

logger = logging.getLogger(__name__)

# One call of a module: its name, and which of its calls in a forward pass, from 1.
Place = tuple[str, int]


class _ReachedError(Exception):
    """Leaves a forward pass on purpose."""


class TruncatedForward:
    """Runs a model up to the last wanted layer and returns the layers' outputs; hooks live for one run only.

    Args:
        model: A frozen model in evaluation mode.
        places: Where each wanted layer's output appears, in the order of the layers.
        last: The place that runs last.
    """

    def __init__(self, model: nn.Module, places: list[Place], last: Place):
        self.places = places
        self.last = last
        self._modules = {name: model.get_submodule(name) for name, _ in places}

    @torch.no_grad()
    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor] | None:
        """Return the features of one batch, or None when the model took another way this time."""
        taken: dict[Place, Tensor] = {}

        def take(place: Place, tensor: Tensor | None) -> None:
            if place in self.places and tensor is not None:
                taken[place] = tensor
            if place == self.last:
                raise _ReachedError

        with _hooks(self._modules, take):
            try:
                model(**inputs)
            except _ReachedError:
                pass
        return [taken[place] for place in self.places] if taken.keys() == set(self.places) else None


@torch.no_grad()
def find_truncation(model: nn.Module, capture: FeatureCapture, inputs: Mapping[str, Any]) -> TruncatedForward | None:
    """Return a truncated forward that gives bit-equal features for a batch, or None where there is none.

    Args:
        model: A frozen model in evaluation mode.
        capture: The layers that are wanted, resolved.
        inputs: What the model takes.
    """
    if not _can_be_left(model):
        return None
    try:
        return _find(model, capture, inputs)
    except RuntimeError as error:  # tensors without memory of their own, say, or too little of it
        logger.debug("%s runs whole: %s", type(model).__name__, error)
        return None


def _find(model: nn.Module, capture: FeatureCapture, inputs: Mapping[str, Any]) -> TruncatedForward | None:
    wanted, places, order = _trace(model, capture, inputs)
    found = [place for place in places if place is not None]
    if len(found) < len(places):
        logger.debug("%s runs whole: not every layer is a module's output", type(model).__name__)
        return None
    truncated = TruncatedForward(model, found, max(found, key=order.__getitem__))
    given = truncated(model, inputs)
    if given is None or not all(map(torch.equal, given, wanted)):
        logger.debug("%s runs whole: cut short, it gives other features", type(model).__name__)
        return None
    logger.debug("%s stops after %s", type(model).__name__, truncated.last[0])
    return truncated


def _trace(
    model: nn.Module, capture: FeatureCapture, inputs: Mapping[str, Any]
) -> tuple[list[Tensor], list[Place | None], dict[Place, int]]:
    """Run the whole model; return the features, where each appears (None: nowhere), and the order of all calls."""
    seen: dict[Place, tuple[int, torch.Size, StorageWeakRef]] = {}

    def note(place: Place, tensor: Tensor | None) -> None:
        if tensor is not None:
            # A weak reference: holding every output would take as much memory as a training.
            seen[place] = (tensor.data_ptr(), tensor.shape, StorageWeakRef(tensor.untyped_storage()))

    modules = {name: module for name, module in model.named_modules() if name}
    with _hooks(modules, note), capture.recording(model) as recorded:
        outputs = model(**inputs, **capture.request(model))
    features = capture.collect(outputs, recorded)
    order = {place: index for index, place in enumerate(seen)}
    if capture.by_name:
        calls = Counter(name for name, _ in seen)
        named: list[Place | None] = [(name, calls[name]) if calls[name] else None for name in capture.names()]
        return features, named, order
    return features, [_place_of(feature, seen) for feature in features], order


def _place_of(feature: Tensor, seen: Mapping[Place, tuple[int, torch.Size, StorageWeakRef]]) -> Place | None:
    """Return the outermost call that gave this very tensor: inside it, an operation in place may still follow."""
    same = [
        place
        for place, (address, shape, storage) in seen.items()
        # Expired: the memory was freed, and given to the feature afterwards.
        if address == feature.data_ptr() and shape == feature.shape and not storage.expired()
    ]
    return same[-1] if same else None


@contextmanager
def _hooks(modules: Mapping[str, nn.Module], tell: Callable[[Place, Tensor | None], None]) -> Iterator[None]:
    """Tell of every call of some modules, and of its first tensor, while the context is open."""
    calls: Counter[str] = Counter()

    def hook_of(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            calls[name] += 1
            tell((name, calls[name]), first_tensor(output))

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _can_be_left(model: nn.Module) -> bool:
    """Whether nothing around the layers counts on their forward to come to its end.

    Offloading and sharding tidy up after each module; capturing that the configuration asks for, on old versions of
    transformers, too.
    """
    config = getattr(model, "config", None)
    captures = any(getattr(config, name, False) for name in ("output_hidden_states", "output_attentions"))
    return runs_by_itself(model) and not captures


def runs_by_itself(model: nn.Module) -> bool:
    """Whether a model is on one device, whole: not dispatched over several, offloaded, or sharded."""
    wrapped = any(hasattr(module, "_hf_hook") or hasattr(module, "_fsdp_wrapped_module") for module in model.modules())
    # DTensor (FSDP2, tensor parallelism) and ZeRO-3 mark the parameters that they shard.
    sharded = any(hasattr(entry, "placements") or hasattr(entry, "ds_id") for entry in model.parameters())
    return getattr(model, "hf_device_map", None) is None and not wrapped and not sharded
