"""The command line, `hf-semckd` or `python -m hf_semckd.cli`: one command a file."""

import importlib
import sys
from collections.abc import Sequence

from ..errors import SemCKDError, nearest

# Imported when they are run: the help needs neither torch nor transformers.
COMMANDS = {
    "make-student": "make_student",
    "cache": "cache",
    "evaluate": "evaluate",
    "report": "report",
    "export": "export",
}
USAGE = """\
usage: hf-semckd COMMAND [options]

  make-student   cut a smaller student out of a fine-tuned teacher
  cache          run the teacher once per sample, ahead of training
  evaluate       compare models: quality kept, size, memory, latency
  report         show what a training learned, as a page
  export         write a model as an ONNX file, in float32 and int8

Options of a command:      hf-semckd COMMAND --help
Several processes (cache): accelerate launch -m hf_semckd.cli cache ...
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, by default the process's, and return the exit status: 2 for arguments that cannot work."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        if words[0] not in COMMANDS:
            near = nearest(words[0], COMMANDS, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise SemCKDError(f"unknown command {words[0]!r}{meant}\n\n{USAGE}")
        importlib.import_module(f".{COMMANDS[words[0]]}", __name__).run(words[1:])
    except (SemCKDError, OSError) as error:
        print(f"hf-semckd: {error}", file=sys.stderr)
        return 2
    return 0
