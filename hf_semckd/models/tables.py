"""Tables for a terminal."""

from collections.abc import Sequence


def aligned_lines(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """Return rows as lines with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)] for row in rows)
    return [indent + "  ".join(cells).rstrip() for cells in padded]
