"""How the teacher's forward runs: on a CUDA stream beside the student, and under `torch.compile`."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .outputs import TeacherOutputs

logger = logging.getLogger(__name__)


class TeacherStream:
    """Runs the teacher on a CUDA stream of its own, beside what the student does; elsewhere at once.

    A teacher that is not `alone`, whole on its device, but dispatched or sharded waits for other devices.
    """

    def __init__(self, device: torch.device, alone: bool):
        self._stream = torch.cuda.Stream(device) if alone and device.type == "cuda" else None

    def run(self, compute: Callable[[], TeacherOutputs]) -> TeacherOutputs:
        """Return what is computed; whoever uses it calls `wait` first."""
        if self._stream is None:
            return compute()
        current = torch.cuda.current_stream(self._stream.device)
        # The batch is ready when what was queued before is done.
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = compute()
        for tensor in outputs.tensors():
            # Its memory must not be given away before the student's stream is done with it.
            tensor.record_stream(current)
        return outputs

    def wait(self) -> None:
        """Make the current stream wait for what was run."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class CompiledForward:
    """A model under `torch.compile`, and without it where that fails; the model itself is not changed.

    Hidden states come out of a compiled forward when an eager one has put transformers' hooks in place, so the first
    call, and the first after `cool`, is eager.

    Attributes:
        active: Whether compiling has not failed.
    """

    def __init__(self, model: nn.Module):
        self.model = model

        def call(**keywords: Any) -> Any:
            return model(**keywords)

        # A function: compiling the module itself would leave a mark on it.
        self._compiled: Any = torch.compile(call)
        self.active = True
        self._warm = False

    def cool(self) -> None:
        """Run eagerly once more."""
        self._warm = False

    def __call__(self, **keywords: Any) -> Any:
        """Run the model."""
        compiled = self.active and self._warm
        self._warm = True
        if not compiled:
            return self.model(**keywords)
        try:
            return self._compiled(**keywords)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler says; an error of the model itself comes again below
            self.active = False
            logger.warning("The teacher runs without torch.compile, which failed: %s", str(error).partition("\n")[0])
            return self.model(**keywords)


def runs_by_itself(model: nn.Module) -> bool:
    """Whether a model is on one device, whole: not dispatched over several, offloaded, or sharded."""
    wrapped = any(hasattr(module, "_hf_hook") or hasattr(module, "_fsdp_wrapped_module") for module in model.modules())
    # DTensor (FSDP2, tensor parallelism) and ZeRO-3 mark the parameters that they shard.
    sharded = any(hasattr(entry, "placements") or hasattr(entry, "ds_id") for entry in model.parameters())
    return getattr(model, "hf_device_map", None) is None and not wrapped and not sharded
