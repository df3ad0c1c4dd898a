"""Markdown tables of rows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from hf_semckd.errors import InputError
from hf_semckd.publishing.card import format_decimal


def spread(values: Sequence[float], signed: bool = False) -> str:
    """Return mean and standard deviation of values, the mean with its sign or without."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{'+' if signed else ''}.2f} ± {deviation:.2f}"


def format_markdown_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """Return a GitHub-flavored Markdown table, numbers aligned right, without a last newline.

    Cells stay Markdown (a link stays a link); only pipes are escaped, since they would end the cell.

    Args:
        rows: One mapping per row; None, and a key that only some of the rows lack, shows as "-".
        columns: Keys of the rows in the order of the columns, also their headings.

    Raises:
        InputError: When there are no columns, or a column is in no row.
    """
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
    present = [[row[column] for row in rows if row.get(column) is not None] for column in columns]
    rule = "|".join("---:" if column and all(map(_is_number, column)) else "---" for column in present)
    return "\n".join([_line(columns), f"|{rule}|", *(_line([row.get(column) for column in columns]) for row in rows)])


def _line(values: Sequence[object]) -> str:
    return "| " + " | ".join(_cell(value).replace("|", "\\|") for value in values) + " |"


def _cell(value: object) -> str:
    """Return a value as one line of text."""
    if value is None:
        return "-"
    if not _is_number(value):
        return " ".join(str(value).split())
    return f"{int(value):,}" if isinstance(value, (int, np.integer)) else format_decimal(float(value))


def _is_number(value: object) -> bool:
    # numpy's integers and float32 are no subclasses of int and float, and bool is a subclass of int.
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
