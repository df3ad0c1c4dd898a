"""Under what conditions something was measured, a file name for the machine, and rounds of measurements in a file."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from hf_semckd.files import write_json
from hf_semckd.publishing.facts import environment, processor

ROOT = Path(__file__).resolve().parents[1]


def add_round(path: Path, case: str, found: Mapping[str, Any], threads: int) -> None:
    """Add a round of a case, a measurement of each of its variants, to a JSON file of `runs` by case and variant."""
    # Stored at once: a round may take minutes.
    stored = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    before = stored.get(case, {}).get("runs", {})
    runs = {variant: [*before.get(variant, []), run] for variant, run in found.items()}
    write_json(path, {**stored, case: {"runs": runs, "threads": threads, "conditions": conditions("cpu")}})


def conditions(device: str) -> dict[str, Any]:
    """Return versions, machine, threads, precision, date and commit, ready for JSON."""
    return {
        **environment(),
        "device": device,
        "machine": machine(device),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "precision": "bfloat16 autocast" if device == "cuda" else "float32",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
    }


def machine(device: str) -> str:
    """Return the model of the processor that is measured: the GPU's, or the CPU's."""
    return torch.cuda.get_device_name() if device == "cuda" else processor()


def file_name(device: str, threads: int) -> str:
    """Return a file name without ending that says on what was measured."""
    name = re.sub(r"[^a-z0-9]+", "-", machine(device).lower().replace("(r)", "").replace("(tm)", "")).strip("-")
    return name if device == "cuda" else f"{name}-{threads}-thread{'s' if threads > 1 else ''}"


def commit() -> str | None:
    """Return the commit of the library, marked where its files differ from it; None outside a checkout.

    Files beside the library do not count: rows and tables change while they are made.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "hf_semckd")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None
