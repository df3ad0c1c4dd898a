"""Faults that tests inject: each is counted, with how it was survived."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from hf_semckd.errors import SemCKDError

RESUMED, REFUSED, ENDED = "resumed exactly", "refused in words", "ended with the cause"
# Training went on to the same weights, but for rounding, and a warning told what was lost.
ALONE = "cost itself alone"
OUTCOMES = (RESUMED, REFUSED, ENDED, ALONE)
INJECTED = "injected"


class Faults:
    """Counts what a test injects, in the properties of its report."""

    def __init__(self, properties: list[tuple[str, Any]]):
        self._properties = properties

    @contextmanager
    def survived(self, kind: str, how: str) -> Iterator[None]:
        """Count a fault that is injected inside, and survived where nothing is raised."""
        assert how in OUTCOMES
        self._properties.append(("fault", (kind, INJECTED)))
        yield
        self._properties.append(("fault", (kind, how)))

    @contextmanager
    def refused(self, kind: str, *words: str, error: type[SemCKDError] = SemCKDError) -> Iterator[None]:
        """Count a fault that is answered by an error of the library's, with its three parts and certain words."""
        with self.survived(kind, REFUSED):
            with pytest.raises(error) as caught:
                yield
            said = str(caught.value)
            missing = [word for word in (*words, "received:", "expected:", "what to do:") if word not in said]
            assert not missing, said


def table(found: Sequence[tuple[str, str]]) -> list[str]:
    """Return the lines of a table of what was counted: kind of fault, and what happened."""
    counts, columns = Counter(map(tuple, found)), (INJECTED, *OUTCOMES)
    rows = [(kind, [counts[kind, column] for column in columns]) for kind in sorted({kind for kind, _ in found})]
    rows.append(("all", [sum(numbers) for numbers in zip(*(row for _, row in rows), strict=True)]))
    lines = [f"| fault | {' | '.join(columns)} | not survived |", f"|---|{'---|' * (len(columns) + 1)}"]
    for kind, numbers in rows:
        lost = numbers[0] - sum(numbers[1:])
        lines.append(f"| {kind} | {' | '.join(map(str, numbers))} | {lost} |")
    return lines
