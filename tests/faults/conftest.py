"""Counts the faults that are injected and how each was survived, and prints the table, also under pytest-xdist."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_counts import Faults, table

BEGIN, END = "<!-- begin: faults -->", "<!-- end: faults -->"


@pytest.fixture
def faults(request: Any) -> Faults:
    """Counts what this test injects."""
    return Faults(request.node.user_properties)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Any]:
    """Return a function that mounts a disk of some bytes; only root can."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False)
        if done.returncode != 0:
            pytest.skip("needs the right to mount a small disk")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int) -> None:
    """Print faults injected and survived, by their kind; all of them go to the page that `FAULTS_PAGE` names."""
    if hasattr(terminalreporter.config, "workerinput"):
        return  # a process of pytest-xdist, which knows its own tests alone
    reports = [report for entries in terminalreporter.stats.values() for report in entries]
    called = [report for report in reports if getattr(report, "when", None) == "call"]
    found = [value for report in called for name, value in report.user_properties if name == "fault"]
    if not found:
        return
    lines = table(found)
    terminalreporter.section("faults survived")
    for line in lines:
        terminalreporter.line(line)
    page, whole = os.environ.get("FAULTS_PAGE"), not terminalreporter.config.option.keyword
    if page and whole and exitstatus == 0:
        before, _, rest = Path(page).read_text(encoding="utf-8").partition(BEGIN)
        behind = rest.partition(END)[2]
        text = "\n".join([BEGIN, *lines, END])
        Path(page).write_text(f"{before}{text}{behind}", encoding="utf-8")
