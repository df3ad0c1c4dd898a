"""The command line, `hf-semckd` or `python -m hf_semckd`: one command a file."""

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from ..errors import ConfigurationError, SemCKDError, nearest
from ..launch import launched_processes
from ..version import __version__

# Imported when they are run: the help needs neither torch nor transformers.
COMMANDS = {
    "distill": "distill",
    "inspect": "inspect",
    "plan": "plan",
    "make-student": "make_student",
    "cache": "cache",
    "evaluate": "evaluate",
    "report": "report",
    "export": "export",
    "push": "push",
}
# In several processes each would do all of any other one, and write over what another wrote; `plan` says so itself.
TOGETHER = ("distill", "cache", "plan")
USAGE = """\
usage: hf-semckd COMMAND [options]

  distill        from a recipe to a student, its deploy table and its report
  plan           estimate time and disk space, with and without a teacher cache
  inspect        show two models' layers, and how they would be compared
  make-student   cut a smaller student out of a fine-tuned teacher
  cache          run the teacher once per sample, ahead of training
  evaluate       compare models: quality kept, size, memory, latency
  report         show what a training learned, as a page
  export         write a model as an ONNX file, in float32 and int8
  push           upload a saved student to the Hub

Options of a command:  hf-semckd COMMAND --help
Several processes:     accelerate launch -m hf_semckd distill recipe.yaml
Everywhere:            --debug shows where an error came from; --version
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, by default the process's.

    Returns the exit status: 0, 2 for what cannot work as it was asked for, 1 where something else failed, 130 when
    interrupted. SIGTERM ends a training with `SystemExit` (143).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if words[0] == "--version":
        print(f"hf-semckd {__version__}")
        return 0
    debug = "--debug" in words
    # A recipe goes on after what fails after its training, and logs that.
    log = logging.getLogger(f"{__name__.partition('.')[0]}.recipes")
    level = log.level
    log.setLevel(logging.DEBUG if debug else level)
    try:
        return _run(words[0], [word for word in words[1:] if word != "--debug"])
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # whatever it is, a traceback helps nobody but us
        if debug:
            traceback.print_exc()
        else:
            known = isinstance(error, (SemCKDError, OSError))
            kind = "" if known else f"{type(error).__name__}: "
            more = "" if isinstance(error, SemCKDError) else "\n(--debug shows where this came from)"
            print(f"hf-semckd: {kind}{error}{more}", file=sys.stderr)
        return 2 if isinstance(error, (SemCKDError, OSError)) else 1
    finally:
        log.setLevel(level)


def _run(command: str, words: list[str]) -> int:
    if command not in COMMANDS:
        near = nearest(command, COMMANDS, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise SemCKDError(f"unknown command {command!r}{meant}\n\n{USAGE}")
    count = launched_processes()
    if count > 1 and command not in TOGETHER:
        raise ConfigurationError(
            f"hf-semckd {command} runs in one process",
            received=f"{count} processes",
            expected="one; `distill` and `cache` run in several",
            todo=f"leave out `accelerate launch` or torchrun: hf-semckd {command}",
        )
    try:
        chosen = importlib.import_module(f".{COMMANDS[command]}", __name__)
        # Bars of loading and writing, which are for notebooks.
        importlib.import_module("transformers.utils.logging").disable_progress_bar()
        status = chosen.run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough, as `head` does. Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status or 0
