"""Tables for terminals and Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import InputError

MISSING = "-"


def format_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """Return a plain text table, numbers aligned right and text left.

    Args:
        rows: One mapping per row; None, and a key that only some of the rows lack, shows as "-".
        columns: Keys of the rows in the order of the columns, also their headings.

    Returns:
        Headings, a rule and the rows, without trailing spaces and without a last newline.

    Raises:
        InputError: When there are no columns, or a column is in no row.
    """
    cells, numeric = _cells(rows, columns)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(values: Sequence[str]) -> str:
        entries = zip(values, widths, numeric, strict=True)
        return "  ".join(text.rjust(width) if right else text.ljust(width) for text, width, right in entries).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])])


def format_markdown_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """Return a GitHub-flavored Markdown table; see `format_table`.

    Cells stay Markdown (a link stays a link); only pipes are escaped, since they would end the cell.
    """
    cells, numeric = _cells(rows, columns)
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
    rule = "|" + "|".join("---:" if right else "---" for right in numeric) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cells(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> tuple[list[list[str]], list[bool]]:
    """Return the headings and rows as text, and which columns hold numbers."""
    if not columns:
        raise InputError(
            "The table has no columns", received="[]", expected="at least one", todo="name keys of the rows"
        )
    unknown = [column for column in columns if rows and not any(column in row for row in rows)]
    if unknown:
        raise InputError(
            "Some columns are in no row",
            received=", ".join(unknown),
            expected=f"some of {', '.join(sorted({str(key) for row in rows for key in row}))}",
            todo="check the spelling",
        )
    values = [[row.get(column) for column in columns] for row in rows]
    cells = [list(map(_cell, columns)), *(list(map(_cell, line)) for line in values)]
    present = [[row[column] for row in rows if row.get(column) is not None] for column in columns]
    return cells, [bool(column) and all(map(_is_number, column)) for column in present]


def _is_number(value: object) -> bool:
    # numpy's integers and float32 are no subclasses of int and float, and bool is a subclass of int.
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _cell(value: object) -> str:
    """Return a value as one line of text."""
    if value is None:
        return MISSING
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return f"{int(value):,}"
    if isinstance(value, (float, np.floating)):
        return _decimal(float(value))
    return " ".join(str(value).split())


def _decimal(value: float) -> str:
    """Return a float with the digits that matter at its size, the same number of decimals for comparable values."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size >= 1000:
        return f"{value:,.1f}"
    return f"{value:.4f}" if size >= 1e-3 or size == 0 else f"{value:.2e}"
