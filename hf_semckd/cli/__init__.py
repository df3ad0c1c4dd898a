"""The command line: `hf-semckd cache` runs a teacher over a dataset ahead of training."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..errors import SemCKDError
from .cache import cache

USAGE = """\
usage: hf-semckd cache --teacher NAME --student NAME --dataset FOLDER --teacher_cache_dir FOLDER [options]

Runs the teacher once over every sample and keeps what the student will learn from. Training with the same
teacher_cache_dir, data and settings then never runs the teacher.

hf-semckd cache --help lists all options: those of the training (SemCKDConfig), and --teacher, --student, --dataset,
--split. With several processes: accelerate launch -m hf_semckd.cli cache ...
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words behind the program's name; None takes those of the process.

    Returns:
        The exit status: 0, or 2 when something was asked for that cannot be done.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if words[0] != "cache":
        print(f"hf-semckd: unknown command {words[0]!r}; expected: cache\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        cache(words[1:])
    except SemCKDError as error:
        print(f"hf-semckd: {error}", file=sys.stderr)
        return 2
    return 0
