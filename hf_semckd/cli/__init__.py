"""The command line: `hf-semckd`, or `python -m hf_semckd.cli`."""

import sys
from collections.abc import Sequence

from ..errors import SemCKDError
from . import cache

USAGE = f"""\
usage: {cache.USAGE}

Runs the teacher once per sample and stores its outputs. Training with the same teacher_cache_dir, data and settings
then does not run the teacher.

List all options, including those of SemCKDConfig:  hf-semckd cache --help
Run on several processes:                           accelerate launch -m hf_semckd.cli cache ...
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, by default the process's, and return the exit status: 2 for arguments that cannot work."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        if words[0] != "cache":
            raise SemCKDError(f"unknown command {words[0]!r}; expected: cache\n\n{USAGE}")
        cache.run(words[1:])
    except SemCKDError as error:
        print(f"hf-semckd: {error}", file=sys.stderr)
        return 2
    return 0
