"""Pictures for the trackers of `report_to`: one small function for each, which imports nothing that is not in use."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..publishing.report.history import PARTS


def picture_senders(callbacks: Sequence[TrainerCallback]) -> list[Callable[[str, np.ndarray, int], None]]:
    """Return a function of name, picture (height, width, 3; uint8) and step for each tracker that is recording."""
    senders: dict[type[TrainerCallback], Callable[[Any], Any]] = {
        TensorBoardCallback: _tensorboard,
        WandbCallback: _wandb,
        TrackioCallback: _trackio,
    }
    found = [send(entry) for entry in callbacks for kind, send in senders.items() if isinstance(entry, kind)]
    return [sender for sender in found if sender is not None]


def quarter(step: int, steps: int) -> int:
    """Return how many quarters of a training are over, 0 to 4."""
    return min(step * PARTS // max(steps, 1), PARTS)


def tensorboard_writer(callbacks: Sequence[TrainerCallback]) -> Any:
    """Return TensorBoard's writer, or None where it is not on."""
    boards = (entry for entry in callbacks if isinstance(entry, TensorBoardCallback))
    return getattr(next(boards, None), "tb_writer", None)


def _tensorboard(callback: TensorBoardCallback) -> Callable[[str, np.ndarray, int], None] | None:
    writer = tensorboard_writer([callback])
    if writer is None:
        return None
    return lambda name, picture, step: writer.add_image(name, picture, step, dataformats="HWC")


def _wandb(callback: WandbCallback) -> Callable[[str, np.ndarray, int], None] | None:
    # The callback has imported it.
    wandb: Any = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return None
    # As the callback logs: by Trainer's step, which is not the tracker's own.
    return lambda name, picture, step: wandb.log({name: wandb.Image(picture), "train/global_step": step})


def _trackio(callback: TrackioCallback) -> Callable[[str, np.ndarray, int], None] | None:
    trackio: Any = sys.modules.get("trackio")
    if trackio is None or trackio.context_vars.current_run.get() is None:
        return None
    return lambda name, picture, step: trackio.log({name: trackio.Image(picture), "train/global_step": step})
