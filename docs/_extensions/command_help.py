"""The directive `command-help`: what a command of `hf-semckd` prints with `--help`."""

import contextlib
import io
import os
from itertools import takewhile
from unittest import mock

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from hf_semckd.cli import main

# argparse wraps by the terminal, and colors its help from Python 3.14 on.
TERMINAL = {"COLUMNS": "88", "NO_COLOR": "1"}


def help_of(words: list[str]) -> str:
    """Return what is printed for `hf-semckd WORDS --help`, 88 columns wide."""
    printed = io.StringIO()
    with mock.patch.dict(os.environ, TERMINAL), contextlib.redirect_stdout(printed):
        with contextlib.suppress(SystemExit):
            main([*words, "--help"])
    return printed.getvalue()


def shortened(text: str, until: str) -> str:
    """Return a help without what stands between the line that begins with `until` and the examples at its end."""
    lines = text.splitlines()
    first = list(takewhile(lambda line: not line.strip().startswith(until), lines))
    if len(first) == len(lines):
        raise ValueError(f"no line of the help begins with {until!r}")
    examples = [place for place, line in enumerate(lines) if line.startswith("example")]
    last = lines[examples[-1] :] if examples else []
    return "\n".join([*first, "  ...", "", *last]).rstrip()


class CommandHelp(SphinxDirective):
    """Shows the help of the command that is named, or the list of commands; `until` leaves out its further options."""

    optional_arguments = 1
    option_spec = {"until": directives.unchanged_required}  # noqa: RUF012 (docutils' form)

    def run(self) -> list[nodes.Node]:
        """Return the nodes that take the directive's place."""
        text = help_of(self.arguments).rstrip()
        if "until" in self.options:
            text = shortened(text, self.options["until"])
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
