"""SIGTERM, which clusters send before they take a machine away, ends a training behind a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback


class _SaveWhenAsked(TrainerCallback):
    """Saves and stops at the end of the step in which it is asked to."""

    asked = False

    def ask(self, *signal_and_frame: Any) -> None:
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:  # there may be seconds left only
            control.should_evaluate = False


@contextlib.contextmanager
def saved_when_terminated(trainer: Any) -> Iterator[None]:
    """Let SIGTERM end a training behind a checkpoint, with `KeyboardInterrupt`.

    Of several processes each would stop at another step: there the signal does what it did.
    """
    if trainer.args.world_size > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    saves = _SaveWhenAsked()
    trainer.add_callback(saves)
    before = signal.signal(signal.SIGTERM, saves.ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        trainer.remove_callback(saves)
    if saves.asked:
        raise KeyboardInterrupt
