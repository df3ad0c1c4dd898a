"""Ways to run a model: by PyTorch on a device, or by ONNX Runtime on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.inputs import inference_inputs, input_device, run_on_inputs
from ..models.latency import forward_call
from ..models.outputs import logits_of
from ..teacher.placement import is_sharded, is_whole
from .export import open_session


class Runtime(Protocol):
    """A model that can be run on batches; `name` tells how, `device` where."""

    name: str
    device: str

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the logits of a batch."""

    def forward(self, batch: Mapping[str, Any]) -> Callable[[], object]:
        """Return a function that runs the model on inputs prepared beforehand, and returns when it is done."""


class PyTorch:
    """A model in evaluation mode; one that is elsewhere than on the device is copied there.

    One that is dispatched over several devices or offloaded runs where it is, and `device` says where that begins.
    Raises `InputError` for one that is divided among processes: all of them would have to run it at the same time.
    """

    name = "PyTorch"

    def __init__(self, model: nn.Module, device: torch.device):
        check_undivided(model)
        whole = is_whole(model)
        moves = whole and any(entry.device != device for entry in model.parameters())
        self.model = (copy.deepcopy(model).to(device) if moves else model).eval()
        self.device = device.type if whole else input_device(model).type

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries of a batch that the model takes, on its device."""
        return inference_inputs(self.model, batch)

    @torch.inference_mode()
    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the logits of a batch."""
        inputs = self.inputs(batch)
        return logits_of(run_on_inputs("model", batch, lambda: self.model(**inputs)), "model")

    def forward(self, batch: Mapping[str, Any]) -> Callable[[], object]:
        """Return a function that runs the model on a batch, and waits for the GPU."""
        return forward_call(self.model, batch)


def check_undivided(model: nn.Module) -> None:
    """Raise `InputError` for a model of which a process has a part: what evaluates it alone would wait for ever."""
    if not any(map(is_sharded, model.parameters())):
        return
    raise InputError(
        "A model that is divided among processes cannot be evaluated",
        received=f"a sharded {type(model).__name__}",
        expected="a model that this process has all of",
        todo="load it anew from its name or folder, and evaluate it in one process",
    )


class OnnxRuntime:
    """A file of `export_onnx`, run with the number of threads of PyTorch; `inputs` picks what the model takes."""

    device = "cpu"

    def __init__(self, name: str, path: Path, inputs: Callable[[Mapping[str, Any]], dict[str, Any]]):
        self.name, self.path = name, path
        self._session, self._inputs = open_session(path), inputs
        self._names = [entry.name for entry in self._session.get_inputs()]

    def _arrays(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        arrays = float_arrays(self._inputs(batch))
        return {name: arrays[name] for name in self._names}

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the logits of a batch."""
        found = [torch.from_numpy(entry) for entry in self._session.run(None, self._arrays(batch))]
        return torch.stack(found, dim=-1) if len(found) == 2 else found[0]

    def forward(self, batch: Mapping[str, Any]) -> Callable[[], object]:
        """Return a function that runs the session on a batch."""
        arrays = self._arrays(batch)
        return lambda: self._session.run(None, arrays)


def float_arrays(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return tensors as arrays, numbers in float32: that is what ONNX files take, and numpy has no bfloat16."""
    tensors = {name: value.cpu() for name, value in inputs.items() if isinstance(value, Tensor)}
    return {name: (value.float() if value.is_floating_point() else value).numpy() for name, value in tensors.items()}
