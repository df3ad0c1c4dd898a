"""Reads docstrings as they are written in this project: plain text in which `backquotes` mean code."""

import re
from typing import Any

from sphinx.application import Sphinx

CODE = re.compile(r"(``[^`]+``|`[^`]+`|:\w+:`[^`]+`)")
# What reStructuredText would take for emphasis, substitutions and references.
MARKUP = re.compile(r"([*|\\]|(?<=\w)_(?!\w))")

NAMES = re.compile(r"(\n +)(\w+(?:, \w+)*),\n +(?=(?:\w+, )*\w+:)")


def to_rest(line: str) -> str:
    """Return a line of a docstring as reStructuredText: code as literals, the rest escaped."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = CODE.split(line)
    parts[0::2] = [MARKUP.sub(r"\\\1", text) for text in parts[0::2]]
    parts[1::2] = [
        code if code.startswith(("``", ":")) else f"`{code}`" for code in parts[1::2]
    ]
    return "".join(parts)


def convert(
    _app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]
) -> None:
    """Convert a docstring in place, before napoleon reads its sections."""
    # Names that share a description may take more than one line; napoleon wants them on one.
    text = NAMES.sub(r"\1\2, ", "\n".join(lines))
    lines[:] = [to_rest(line) for line in text.split("\n")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to autodoc."""
    app.connect("autodoc-process-docstring", convert, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
