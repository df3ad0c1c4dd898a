"""On SIGTERM, which clusters send before they take a machine away, a training saves a checkpoint and stops."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from .arriving import StopRequest

logger = logging.getLogger(__name__)
# What a shell reports of a process that SIGTERM has ended.
TERMINATED = 128 + signal.SIGTERM


class _SaveWhenAsked(TrainerCallback):
    """Saves at the end of the step after which all processes stop, and ends the training after the checkpoint."""

    def __init__(self, stop: StopRequest, alone: bool):
        self.stop, self.alone = stop, alone

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.alone:
            self.stop.agreed = self.stop.asked
        if self.stop.agreed:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there may be seconds left only

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stop.agreed:
            logger.warning(
                "SIGTERM: training ends after step %d of %d, with checkpoint-%d in %s. "
                "train(resume_from_checkpoint=True) goes on from it.",
                state.global_step,
                state.max_steps,
                state.global_step,
                args.output_dir,
            )
            raise SystemExit(TERMINATED)


@contextlib.contextmanager
def saved_when_terminated(trainer: Any, stop: StopRequest | None = None) -> Iterator[None]:
    """Let a training save a checkpoint on SIGTERM and stop, with `SystemExit` (143).

    It does what it did where no checkpoints are wanted (`save_strategy="no"`), where a handler is set already (yours,
    or that of `enable_jit_checkpoint`), outside the main thread, and with several processes that have no `stop` in
    common.
    """
    args = trainer.args
    alone = args.world_size == 1
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    wanted = args.save_strategy != SaveStrategy.NO and not getattr(args, "enable_jit_checkpoint", False)
    if not mine or not wanted or not (alone or stop is not None):
        yield
        return
    stop, process = stop or StopRequest(), os.getpid()
    stop.start()

    def ask(*_: Any) -> None:
        if os.getpid() != process:  # a fork has the handler too, and nothing to save
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        stop.asked = True

    saves = _SaveWhenAsked(stop, alone)
    trainer.add_callback(saves)
    signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        trainer.remove_callback(saves)
    if stop.asked:  # too late for a step of its own: the process ends as it would have
        os.kill(process, signal.SIGTERM)
