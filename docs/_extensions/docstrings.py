"""Reads docstrings as they are written in this project: plain text in which `backquotes` mean code."""

import re
from typing import Any

from sphinx.application import Sphinx

CODE = re.compile(r"(``[^`]+``|`[^`]+`|:\w+:`[^`]+`)")
# What reStructuredText would take for emphasis, substitutions and references.
MARKUP = re.compile(r"([*|\\]|(?<=\w)_(?!\w))")
# Names that share a description and take more than one line, where napoleon expects one.
NAMES = re.compile(r"(\n +)(\w+(?:, \w+)*),\n +(?=(?:\w+, )*\w+:)")
SECTION = re.compile(r"(Args|Attributes|Example|Raises|Returns|Source|Yields):")
# Stands for a colon that napoleon would take for the end of a type.
COLON = "\N{RATIO}"


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


def before_napoleon(
    _app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]
) -> None:
    """Convert a docstring in place, and hide the colons that end no type."""
    section = ""
    converted = []
    for line in NAMES.sub(r"\1\2, ", "\n".join(lines)).split("\n"):
        header = SECTION.fullmatch(line.strip())
        section = header[1] if header else section
        typed = header or section not in ("", "Returns", "Yields")
        converted.append(to_rest(line if typed else line.replace(": ", f"{COLON} ")))
    lines[:] = converted


def after_napoleon(
    _app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]
) -> None:
    """Show the colons again."""
    lines[:] = [line.replace(COLON, ":") for line in lines]


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to autodoc, around napoleon."""
    app.connect("autodoc-process-docstring", before_napoleon, priority=100)
    app.connect("autodoc-process-docstring", after_napoleon, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
