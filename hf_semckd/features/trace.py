"""What one forward pass tells of a model: which modules ran, which made each hidden state, and where patches lie."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from ..models.outputs import first_tensor

# A stage ends in a transition where this many positions become one or fewer; a class token more is none.
TRANSITION = 2
# Sums of the same values in another order agree to better than this in float64; a block may change little more.
SAME = 1e-12


@dataclass(frozen=True)
class Call:
    """A module that ran: its name, the shape of the first tensor that it returned, and a fingerprint of its values.

    The tensor itself is held weakly, so that the trace of a large model takes no memory.
    """

    name: str
    shape: tuple[int, ...]
    fingerprint: Tensor
    tensor: weakref.ref[Tensor]


class ForwardTrace:
    """The calls of a model's modules in one forward pass, in the order in which they returned.

    Attributes:
        grids: (height, width) of the maps that two-dimensional convolutions returned, in this order.
        patches: By the number of tokens of a block's input: the places (start, stop) of those that differ between the
            samples, of random images (see `with_random_images`). The others (CLS, registers, detection tokens) are the
            model's own. Empty for a single sample.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.grids: list[tuple[int, int]] = []
        self.patches: dict[int, tuple[int, int]] = {}
        self._met: set[int] = set()

    @classmethod
    @contextmanager
    def recording(cls, model: nn.Module) -> Iterator[ForwardTrace]:
        """Record the forward passes of a model while the context is open; no hook survives it."""
        trace = cls()
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                hooks.enter_context(module.register_forward_hook(partial(trace._note_call, name)))
                if name.rpartition(".")[2].isdigit():
                    hooks.enter_context(module.register_forward_pre_hook(trace._note_patches, with_kwargs=True))
            yield trace

    def makers(self, state: Tensor) -> list[str]:
        """Return the modules that returned the values of a tensor, in any layout; inner ones come first."""
        same = [call.name for call in self.calls if call.tensor() is state]
        if any("#" in pattern_of(name) for name in same):
            return same
        known, size = _fingerprint(state), state.numel()
        near = [call for call in self.calls if math.prod(call.shape) == size]
        return [call.name for call in near if torch.allclose(call.fingerprint, known, rtol=SAME, atol=0)]

    def returns(self, name: str, states: Sequence[Tensor]) -> bool:
        """Whether a module returned a tensor of the shape of one of the states, so that a hook on it records them."""
        shapes = {tuple(state.shape) for state in states}
        return any(call.name == name and call.shape in shapes for call in self.calls)

    def members(self, pattern: str) -> list[str]:
        """Return the modules of a pattern (see `pattern_of`) that ran, in the order of their first call."""
        return list(dict.fromkeys(call.name for call in self.calls if pattern_of(call.name) == pattern))

    def blocks_within(self, name: str) -> list[Call]:
        """Return the calls of the outermost numbered modules within a module (the blocks of a stage), or in all."""
        start = f"{name}." if name else ""
        inside = [(call, pattern_of(call.name[len(start) :])) for call in self.calls if call.name.startswith(start)]
        return [call for call, own in inside if own.endswith("#") and own.count("#") == 1]

    @property
    def numbered(self) -> list[Call]:
        """The calls of the outermost numbered modules that return maps or tokens."""
        return [call for call in self.blocks_within("") if len(call.shape) >= 3]

    @property
    def blocks(self) -> list[Call]:
        """Those of the `numbered` calls whose modules hold modules."""
        holders = {call.name.rpartition(".")[0] for call in self.calls}
        return [call for call in self.numbered if call.name in holders]

    def blocks_of_length(self, length: int) -> list[str]:
        """Return the blocks of the longest list whose members return so many tokens; of two such lists, the later."""
        lists: dict[str, dict[str, None]] = {}
        for call in self.blocks:
            if len(call.shape) == 3 and call.shape[1] == length:
                lists.setdefault(pattern_of(call.name), {})[call.name] = None
        return max(map(list, reversed(lists.values())), key=len, default=[])

    def _note_call(self, name: str, module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor = first_tensor(output)
        # An expert that no token was sent to returns an empty tensor.
        if tensor is None or tensor.dim() < 2 or not tensor.numel():
            return
        self.calls.append(Call(name, tuple(tensor.shape), _fingerprint(tensor), weakref.ref(tensor)))
        if isinstance(module, nn.Conv2d):
            self.grids.append((int(tensor.shape[2]), int(tensor.shape[3])))

    def _note_patches(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        tensor = first_tensor((*args, *kwargs.values()))
        if tensor is None or tensor.dim() != 3 or len(tensor) < 2 or not self.grids or tensor.shape[1] in self._met:
            return
        # Behind the first block attention has mixed all positions.
        self._met.add(tensor.shape[1])
        varying = (tensor != tensor[:1]).any(2).any(0).nonzero().flatten().tolist()
        if varying and varying[-1] - varying[0] + 1 == len(varying):
            self.patches[tensor.shape[1]] = varying[0], varying[-1] + 1


def with_random_images(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's inputs with noise in place of images, two samples at least; as they are without images.

    Real images may share a margin, whose patches would look like the model's own tokens.
    """
    images = {name for name, value in inputs.items() if isinstance(value, Tensor) and value.dim() > 3}
    images = {name for name in images if inputs[name].is_floating_point()}
    if not images:
        return dict(inputs)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dim()}
    if any(len(inputs[name]) == 1 for name in images):
        tensors = {name: torch.cat([value, value]) for name, value in tensors.items()}
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(tensors[name].shape, generator=generator).to(tensors[name]) for name in images}
    return {**inputs, **tensors, **noise}


@dataclass(frozen=True)
class FoundLayers:
    """A model's blocks: the hidden states that hold their outputs, or None, and the modules that made them."""

    states: list[int] | None
    modules: list[str]


def pattern_of(name: str) -> str:
    """Return a module's name with numbers as `#`: blocks of one list share it."""
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


def find_layers(states: Sequence[Tensor], trace: ForwardTrace) -> FoundLayers | None:
    """Find the blocks among a model's hidden states; None where no state was made by a numbered module.

    Blocks are the members of the list of modules that made most of the states. Embeddings and stems are none, nor are
    transitions between stages, and a stage that ends in a transition is taken before it. Where the last state is the
    final norm of the last block's output, it stands for that block, or is left out if the block's own is there too.
    """
    if not all(bool(_fingerprint(state).isfinite().all()) for state in states):
        return None
    makers = [trace.makers(state) for state in states]
    counts = Counter(pattern for names in makers for pattern in {*map(pattern_of, names)} if "#" in pattern.split("."))
    if not counts:
        return None
    pattern = min(counts, key=lambda entry: (-counts[entry], entry.count(".")))
    found: dict[int, str] = {}
    for i, names in enumerate(makers):
        # A state that no module made is what the model says it is; the first may be an embedding.
        made = [name for name in names if pattern_of(name) == pattern]
        if made or (i > 0 and not names):
            found[i] = made[-1] if made else ""
    members = trace.members(pattern)
    ran, last = len(members), len(states) - 1
    if len(found) < ran and last not in found and states[last].shape == states[max(found)].shape:
        found[last] = members[-1]
    left_out = members[-1] not in found.values() and all(found.values())
    if left_out and len(found) == ran - 1 and trace.returns(members[-1], states):
        # A model that notes what goes into its blocks leaves out what comes out of the last.
        return FoundLayers(None, [*found.values(), members[-1]])
    found = _without_transitions(found, states, trace)
    modules = [_before_transition(states[i], name, trace) for i, name in found.items()]
    return FoundLayers(list(found) if modules == list(found.values()) else None, modules)


def find_blocks(trace: ForwardTrace) -> list[str]:
    """Find the blocks of a model that returns no hidden states: the outermost numbered modules with modules inside.

    Where these are in several lists side by side (`layer1.0`, `layer2.0`), the lists are stages, and the last block of
    each counts; all do where the lists are in several towers (see `towers`). Of a list of stages and transitions the
    stages count, which hold blocks; a plain list of layers is cut where the resolution changes. Empty where no module
    is numbered.
    """
    blocks = trace.blocks
    ends_of_lists = {call.name.rpartition(".")[0]: call.name for call in blocks}
    if len(ends_of_lists) > 1 and not towers([call.name for call in blocks]):
        return list(ends_of_lists.values())
    if len(blocks) > 1:
        staged = [call for call in blocks if trace.blocks_within(call.name)]
        return list(dict.fromkeys(call.name for call in (staged if len(staged) > 1 else blocks)))
    ends = [call.name for call, after in pairwise(trace.numbered) if after.shape[2:] != call.shape[2:]]
    return list(dict.fromkeys([*ends, *(call.name for call in trace.numbered[-1:])]))


def towers(names: Sequence[str]) -> list[str]:
    """Return the part of a model that each block is in, where these are several lists in parts of their own.

    `vision_model.encoder.layers.0` and `text_model.encoder.layers.0` are in two towers, `layer1.0` and `layer2.0` in
    one. Empty for a single tower.
    """
    lists = [name.rpartition(".")[0].split(".") for name in names]
    shared = len(list(takewhile(lambda column: len({*column}) == 1, zip(*lists, strict=False))))
    parts = [parts[shared] for parts in lists if len(parts) >= shared + 3]
    count = len({tuple(parts) for parts in lists})
    return parts if len(parts) == len(names) and len({*parts}) == count > 1 else []


def _without_transitions(found: dict[int, str], states: Sequence[Tensor], trace: ForwardTrace) -> dict[int, str]:
    """Drop the members that only change the resolution, between stages that hold blocks."""
    staged = {name for name in found.values() if trace.blocks_within(name)}
    return {
        i: name
        for i, name in found.items()
        if not staged or name in staged or i == 0 or states[i].shape[2:] == states[i - 1].shape[2:]
    }


def _before_transition(state: Tensor, stage: str, trace: ForwardTrace) -> str:
    """Return the stage's last block before it reduces the resolution, or the stage where it does not at its end."""
    blocks = [call for call in trace.blocks_within(stage) if len(call.shape) >= 3 and call.shape[0] == len(state)]
    alike = [call for call in blocks if _positions(call.shape) == _positions(blocks[0].shape)]
    reduced = 2 * len(alike) > len(blocks) and _positions(alike[-1].shape) >= TRANSITION * _positions(state.shape)
    return alike[-1].name if reduced else stage


def _positions(shape: Sequence[int]) -> int:
    """Return the number of positions of a map (B, C, H, W) or of tokens (B, N, C)."""
    return math.prod(shape[2:]) if len(shape) == 4 else shape[1]


def _fingerprint(tensor: Tensor) -> Tensor:
    """Return four numbers (4,) that tell values apart whatever their layout; on the device, so that nothing waits.

    No plain sum is among them: that of a normalized output is nothing but rounding.
    """
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64
    values = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    values = values if values.is_floating_point() else values.to(wide)
    # No wide copy of the values is made: the logits of a large vocabulary are among them.
    norms = [torch.linalg.vector_norm(values, order, dtype=wide) for order in (1, 2)]
    return torch.stack([*norms, values.amax().to(wide), values.amin().to(wide)])
