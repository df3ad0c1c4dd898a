"""Launches every engine once, and prints engines by checks, also under pytest-xdist."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_cases import CHECKS, ENGINES, launch

BEGIN, END = "<!-- begin: engines -->", "<!-- end: engines -->"


@pytest.fixture(scope="session")
def outcome_of(tmp_path_factory: Any, request: Any) -> Callable[[str, str], Path]:
    """A function that returns the folder of what an engine made of a problem, which is run once."""
    return lambda engine, problem: launch(engine, problem, tmp_path_factory, request)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int) -> None:
    """Print which checks each engine has passed; all of them go to the page that `ENGINES_PAGE` names."""
    if hasattr(terminalreporter.config, "workerinput"):
        return  # a process of pytest-xdist, which knows its own tests alone
    reports = [report for entries in terminalreporter.stats.values() for report in entries]
    found: dict[tuple[str, str], set[str]] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == "engine" and report.when == "call":
                found.setdefault(tuple(value), set()).add(report.outcome)
    if not found:
        return
    lines = ["| engine | " + " | ".join(CHECKS) + " |", "|---" * (1 + len(CHECKS)) + "|"]
    for engine in ENGINES:
        cells = [found.get((engine, check), set()) for check in CHECKS]
        marks = ["passed" if cell == {"passed"} else ", ".join(sorted(cell - {"passed"})) or "-" for cell in cells]
        lines.append(f"| {engine} | " + " | ".join(marks) + " |")
    terminalreporter.section("engines by checks")
    for line in lines:
        terminalreporter.line(line)
    page = os.environ.get("ENGINES_PAGE")
    if page and exitstatus == 0 and not terminalreporter.config.option.keyword:
        before, _, rest = Path(page).read_text(encoding="utf-8").partition(BEGIN)
        text = "\n".join([BEGIN, *lines, END])
        Path(page).write_text(f"{before}{text}{rest.partition(END)[2]}", encoding="utf-8")
