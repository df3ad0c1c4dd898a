"""Memory: what a variant is expected to need, what is free, and the peak of a step, each variant in a new process."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from hf_semckd.losses import SemCKDLoss

from .pairs import Pair
from .rounds import run_rounds
from .variants import Variant, make_variant

SCRIPT = Path(__file__).resolve().parents[1] / "benchmark_step.py"
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
CONTROL_GROUP = Path("/sys/fs/cgroup")
FLOAT_BYTES = 4
# Of a published projection autograd keeps four tensors twice as wide as the teacher and the difference itself.
SAVED_WIDTHS = 9
MEASURED_STEPS = 3


def published_bytes(semckd: Variant, batch_size: int, optimizer: bool) -> int:
    """Estimate what the published form adds to a step, without making it: weights, gradients, saved activations.

    Args:
        semckd: The default form for the same pair, which knows the layers.
        batch_size: Samples in a batch.
        optimizer: Whether Adam's two moments count.
    """
    loss = semckd.feature_loss
    with torch.device("meta"):
        published = SemCKDLoss.published(loss.student_specs, loss.teacher_specs, batch_size)
    weights = sum(parameter.numel() for parameter in published.parameters())
    saved = sum(
        min(student.length, teacher.length) * teacher.channels * SAVED_WIDTHS
        for student in loss.student_specs
        for teacher in loss.teacher_specs
    )
    return FLOAT_BYTES * (weights * (4 if optimizer else 2) + saved * batch_size)


def free_bytes(device: str) -> int:
    """Return the memory that is free now: of the GPU, or of the machine within its control group's limit."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((CONTROL_GROUP / "memory.max").read_text())
        free = min(free, limit - int((CONTROL_GROUP / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no control group, or one without a limit ("max")
    return free


def measure_peak(pair: Pair, name: str, device: str) -> dict[str, Any]:
    """Return the peak of complete training steps of one variant, optimizer included, in bytes; in this process.

    On a CPU it is the resident memory of the whole process: Python, torch, teacher, student, data and all.
    """
    with tempfile.TemporaryDirectory() as folder:
        teacher = pair.make_teacher() if name != "ce" else None
        variant = make_variant(name, pair, pair.make_student(), teacher, device, Path(folder))
        batches = [{key: value.to(device) for key, value in batch.items()} for batch in pair.make_batches(2)]
        run_rounds([variant], batches, len(batches), f"{pair.name} {name}: warm-up")
        _train(variant, batches, 1)
        how = reset_peak(device)
        before = current_bytes(device)
        _train(variant, batches, MEASURED_STEPS)
        return {"peak_bytes": peak_bytes(device, how), "bytes_before_steps": before, "how": how}


def measure_peak_elsewhere(pair: str, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `measure_peak` in a process of its own, so that no variant inherits another's memory.

    Returns:
        What it returns, or {"skipped": reason} when the process ended early, as one does that ran out of memory.
    """
    command = [sys.executable, str(SCRIPT), "--memory-of", pair, name, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"skipped": f"its process ended with status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _train(variant: Variant, batches: Sequence[dict[str, torch.Tensor]], steps: int) -> None:
    for index in range(steps):
        variant.compute_gradients(batches[index % len(batches)])
        variant.update()
        variant.model.zero_grad()


def reset_peak(device: str) -> str:
    """Forget the peak so far; return which counter will tell the next."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return "max_memory_allocated"
    try:
        CLEAR.write_text("5")
    except OSError:
        # Not Linux, or not allowed: then the peak of making the models counts as well.
        return "ru_maxrss"
    return "VmHWM"


def current_bytes(device: str) -> int:
    """Return the memory in use now: resident of this process, or of torch on a GPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else int(psutil.Process().memory_info().rss)


def peak_bytes(device: str, how: str) -> int:
    """Return the peak since `reset_peak`, which returned `how` it is counted."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if how == "VmHWM":
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
