"""Values that the host reads when they have arrived from the device, so that it need not wait for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Arriving:
    """A tensor on its way to the CPU; `arrived` tells when it is there, None when reading waits by itself."""

    values: Tensor
    arrived: torch.cuda.Event | None = None

    @classmethod
    def of(cls, values: Tensor) -> Arriving:
        """Send a tensor off, where it is on CUDA: such a copy goes to pinned memory, and the host goes on."""
        if not values.is_cuda:
            return cls(values)
        sent = cls(values.to("cpu", non_blocking=True), torch.cuda.Event())
        assert sent.arrived is not None
        sent.arrived.record()
        return sent

    def read(self) -> Any:
        """Return the values, as a number or list, waiting for them where they have not arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


class StopRequest:
    """Whether this process was asked to stop, and whether all know of it, who must stop after the same step.

    On an accelerator what the processes told each other is read one step late, so that the host does not wait.

    Attributes:
        asked: Whether SIGTERM has come here.
        agreed: Whether every process stops after this step.
    """

    def __init__(self) -> None:
        self.asked = self.agreed = False
        self._pending: Arriving | None = None

    def start(self) -> None:
        """Begin a training, which nobody has asked to stop."""
        self.asked = self.agreed = False
        self._pending = None

    def share(self, asking: Tensor) -> None:
        """Take what an optimizer step's reduction says: how many processes were asked to stop, a scalar."""
        seen = Arriving.of(asking)
        before, self._pending = (seen, None) if asking.device.type == "cpu" else (self._pending, seen)
        self.agreed = self.agreed or (before is not None and before.read() > 0)
