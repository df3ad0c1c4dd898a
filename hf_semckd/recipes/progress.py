"""What is shown while a recipe runs: lines that stay, and a bar in a terminal or a few lines in a log."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from typing import Any, TextIO

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

TERMS = {"loss": "loss", "task_loss": "task", "logit_loss": "logits", "feature_loss": "features"}
TERMS |= {f"eval_{name}": f"eval {name}" for name in ("loss", "accuracy", "exact_match", "pearson")}
# A log gets so many lines of a training at most.
LINES = 20
MARGIN = 10


@dataclass(frozen=True)
class Voice:
    """Prints for people, on one process alone; `stream` is stderr where stdout is for machines."""

    speaks: bool = True
    stream: TextIO | None = None

    @property
    def width(self) -> int | None:
        """The columns of the terminal; None where there is none, and lines may be of any length."""
        stream = self.stream or sys.stdout
        return shutil.get_terminal_size().columns if stream.isatty() else None

    def __call__(self, topic: str, text: str) -> None:
        """Print a line, or several, beside their topic."""
        if self.speaks:
            lines = text.splitlines() or [""]
            rest = "".join(f"\n{'':{MARGIN}}{line}" for line in lines[1:])
            print(f"{topic:{MARGIN}}{lines[0]}{rest}", file=self.stream or sys.stdout, flush=True)

    def text(self, text: str) -> None:
        """Print a text as it is."""
        if self.speaks:
            print(text, file=self.stream or sys.stdout, flush=True)


def use_progress(trainer: Any, name: str, voice: Voice) -> None:
    """Let a trainer show its progress under a name, in place of Trainer's own."""
    for kind in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(kind)
    if voice.speaks:
        trainer.add_callback(ProgressLines(name, voice) if trainer.args.disable_tqdm else ProgressBar(name))


class ProgressBar(ProgressCallback):
    """A bar with a name and the loss."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the loss after the bar."""
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


class ProgressLines(TrainerCallback):
    """A line every few steps, for logs."""

    def __init__(self, name: str, voice: Voice):
        self.name, self.voice = name, voice
        self._begun, self._from, self._said = 0.0, 0, -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to measure."""
        self._begun, self._from, self._said = time.perf_counter(), state.global_step, -1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the losses, unless the last line is too near."""
        known = {shown: float(logs[name]) for name, shown in TERMS.items() if name in (logs or {})}
        place = state.global_step * LINES // max(state.max_steps, 1)
        if not known or (place == self._said and "eval_loss" not in (logs or {})):
            return
        self._said = place
        seconds = time.perf_counter() - self._begun
        done = state.global_step - self._from
        left = seconds * (state.max_steps - state.global_step) / max(done, 1)
        losses = "  ".join(f"{shown} {value:.4g}" for shown, value in known.items())
        self.voice(
            self.name,
            f"step {state.global_step}/{state.max_steps}  {losses}  ({duration(seconds)}, {duration(left)} left)",
        )


def duration(seconds: float) -> str:
    """Return a time with its units, the two largest ones: 1 s, 1 min 23 s, 1 h 05 min, 4 d 6 h."""
    if (whole := round(seconds)) < 60:
        return f"{whole} s"
    if whole < 60 * 60:
        return f"{whole // 60} min {whole % 60:02} s"
    if (minutes := round(seconds / 60)) < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"
