"""The rows of a whole tiny protocol, which is run once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from accuracy.data import Splits, load_splits
from accuracy.protocol import read_protocols
from accuracy.rows import read_rows
from accuracy.runs import Bench
from accuracy_cases import write_protocol
from launching import shared_folder


@dataclass(frozen=True)
class Ran:
    """A protocol that was run, and benches of it that find its teacher trained.

    Attributes:
        outputs: Folder of the teacher and its cached outputs.
        path: File of the rows.
    """

    outputs: Path
    path: Path

    @cached_property
    def lines(self) -> list[str]:
        return self.path.read_text().splitlines()

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.path)

    def bench(self, folder: Path, **changes: Any) -> Bench:
        """A bench whose rows lie in a folder."""
        (protocol,) = read_protocols(write_protocol(folder, **changes))
        return Bench(protocol, folder, outputs=self.outputs)

    def copied(self, folder: Path, leave_out: Any = None) -> Path:
        """Copy the rows into a folder, but for one."""
        lines = [line for line in self.lines if leave_out is None or not leave_out(json.loads(line))]
        assert len(lines) == len(self.lines) - (leave_out is not None)
        path = folder / "tiny.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines))
        return path


@pytest.fixture(scope="session")
def ran(tmp_path_factory: Any, request: Any) -> Ran:
    with shared_folder("accuracy", tmp_path_factory, request) as (folder, empty):
        found = Ran(folder / "outputs", folder / "tiny.jsonl")
        if empty:
            found.bench(folder).run()
    return found


@pytest.fixture(scope="session")
def digits() -> Splits:
    return load_splits("digits", (("test", 60), ("validation", 50)))
