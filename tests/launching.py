"""Runs commands and workers of the tests in processes of their own, without a deadline that a slow machine misses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
WORLD = 2
# Ends a process that hangs. No test may come near it: an outcome never depends on how fast the machine is.
HANG = 3600
# torchrun takes a process that shows no sign of life for 15 s for dead, which a busy machine's may well be.
PATIENT = f"join_timeout={HANG},read_timeout={HANG},keep_alive_max_attempt={HANG}"


def run(
    *command: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run a command on one thread and return its exit status and what it printed.

    Args:
        command: The words of the command.
        cwd: Its folder; None: that of the tests' process.
        env: Its environment; None: that of the tests' process. The library and the tests' modules can be imported.
        changes: Variables that differ.
    """
    environment = dict(os.environ if env is None else env) | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(TESTS), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment | changes,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )


def python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run this Python with arguments; see `run`."""
    return run(sys.executable, *arguments, **options)


def torchrun(script: Path, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script in two processes that torchrun connects; see `run`."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--rdzv-conf", PATIENT, "--nproc-per-node", WORLD)
    return python(*launcher, script, *arguments, **options)


@contextmanager
def shared_folder(name: str, tmp_path_factory: Any, request: Any) -> Iterator[tuple[Path, bool]]:
    """Give a folder that all processes of pytest-xdist have in common, and whether it has to be filled.

    The others wait until the first one has filled it.
    """
    spread = hasattr(request.config, "workerinput")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if spread else base) / name
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        yield folder, not (folder / "filled").is_file()
        (folder / "filled").touch()


def launch_once(worker: str, name: str, tmp_path_factory: Any, request: Any) -> Path:
    """Run a worker of this folder in two processes, once for all processes of pytest-xdist.

    Returns:
        The folder that the worker was given, with all that was printed in `output.txt`.
    """
    with shared_folder(name, tmp_path_factory, request) as (folder, empty):
        if empty:
            done = torchrun(TESTS / worker, folder)
            (folder / "output.txt").write_text(f"{done.stdout}{done.stderr}\nexit status {done.returncode}\n")
    return folder


def assert_launched(folder: Path) -> None:
    """Fail with what was printed unless both processes came to their end."""
    output = (folder / "output.txt").read_text()
    assert output.count(f"world size {WORLD}") == WORLD, output[-3000:]
    assert "exit status 0" in output, output[-3000:]
