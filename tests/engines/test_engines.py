"""Every engine trains as DDP does, from the files of `examples/accelerate_configs`, in two processes on the CPU.

DDP itself is compared with one process and with a training by hand in `tests/training/test_distributed.py`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import CHECKS, ENGINES, REFERENCE
from engines.engine_worker import ARGUMENTS, MIDDLE, STEPS
from launching import WORLD
from safetensors.torch import load_file
from tiny import PROBLEMS
from torch import Tensor

pytestmark = pytest.mark.engines
# Sums of gradients in another order, in float32, and Adam's steps on them.
TOLERANCE = 1e-5


def rows(folder: Path, job: str, *names: str) -> list[dict[str, float]]:
    """Return what was logged of every step of a job."""
    logged = json.loads((folder / job / "log.json").read_text())
    return [{name: row[name] for name in names} for row in logged if names[0] in row]


def student(folder: Path, job: str, problem: str) -> dict[str, Tensor]:
    """Return the weights that `from_pretrained` reads of what a job has saved; none may be missing."""
    kind: Any = type(PROBLEMS[problem].student())
    model, info = kind.from_pretrained(folder / job, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.state_dict()


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys() and first
    far = {name: float((value.double() - second[name].double()).abs().max()) for name, value in first.items()}
    assert not {name: gap for name, gap in far.items() if not gap <= TOLERANCE}


def assert_rows(first: list[dict[str, float]], second: list[dict[str, float]]) -> None:
    assert len(first) == len(second) > 0
    for step, (one, other) in enumerate(zip(first, second, strict=True)):
        assert one == pytest.approx(other, abs=TOLERANCE), step


def check(folder: Path, expected: Path, what: str, problem: str) -> None:
    """Compare an engine with the reference in one respect."""
    terms = ("loss", "task_loss", "logit_loss", "feature_loss")
    if what == "losses":
        assert_rows(rows(folder, "trained", *terms), rows(expected, "trained", *terms))
        assert_rows(rows(folder, "trained", "eval_loss"), rows(expected, "trained", "eval_loss"))
        assert len(rows(folder, "trained", *terms)) == STEPS
    elif what == "clipped gradients":
        norms = rows(folder, "trained", "grad_norm")
        assert max(row["grad_norm"] for row in norms) > ARGUMENTS["max_grad_norm"]
        assert_rows(norms, rows(expected, "trained", "grad_norm"))
    elif what == "projections":
        found = load_file(folder / "trained" / "outcome.safetensors")
        assert any(name.startswith("projection") for name in found)
        assert_close(found, load_file(expected / "trained" / "outcome.safetensors"))
    elif what == "saved student":
        assert_close(student(folder, "trained", problem), student(expected, "trained", problem))
    elif what == "best checkpoint":
        best, last = student(folder, "best", problem), student(folder, "trained", problem)
        assert_close(best, student(expected, "best", problem))
        assert any(not torch.equal(best[name], last[name]) for name in best)
    else:
        same_in_the_end(folder, what, problem)


def same_in_the_end(folder: Path, what: str, problem: str) -> None:
    """Compare what another job on the same engine leads to: the same training by another way."""
    jobs = {"resumed": ["resumed"], "sharded teacher": ["placed"], "models loaded by the engine": ["loaded", "named"]}
    for job in jobs[what]:
        assert_close(student(folder, job, problem), student(folder, "trained", problem))
        states = [load_file(folder / name / "outcome.safetensors") for name in (job, "trained")]
        assert_close(*states)
        names, first = ("loss", "feature_loss", "grad_norm"), MIDDLE if what == "resumed" else 0
        assert_rows(rows(folder, job, *names)[first:], rows(folder, "trained", *names)[first:])


@pytest.mark.parametrize("what", CHECKS)
@pytest.mark.parametrize("problem", ["vit", "next_word"])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_trains_as_ddp_does(
    engine: str, problem: str, what: str, outcome_of: Callable[[str, str], Path], request: Any
) -> None:
    request.node.user_properties.append(("engine", (engine, what)))
    if ENGINES[engine].is_deepspeed and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed (the extra `engines`)")
    folder = outcome_of(engine, problem)
    output = (folder / "output.txt").read_text()
    assert output.count(f"world size {WORLD}") == WORLD, output[-3000:]
    check(folder, outcome_of(REFERENCE, problem), what, problem)
