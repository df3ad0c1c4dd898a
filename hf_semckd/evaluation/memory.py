"""The peak memory of a process that loads a saved model and runs one batch; the process runs this file."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

STATUS = Path("/proc/self/status")


def peak_memory(model: Path, inputs: Mapping[str, np.ndarray], kind: str | None = None) -> int | None:
    """Return the peak resident memory in bytes of a new process, libraries included; None where it cannot be told.

    Args:
        model: Folder of `save_pretrained`, or an ONNX file.
        inputs: The batch, by the names that the model takes.
        kind: Class of transformers that loads the folder; None for an ONNX file.
    """
    if not STATUS.exists():
        return None
    arrays = model.with_name(f"{model.name}.inputs")
    save_file({name: np.ascontiguousarray(value) for name, value in inputs.items()}, arrays)
    command = [sys.executable, __file__, str(model), str(arrays), *([kind] if kind else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.fullmatch(r"peak (\d+)\n?", done.stdout)
    return int(found.group(1)) if found else None


def own_peak() -> int | None:
    """Return the peak resident memory of this process in bytes; None where it cannot be told.

    Not by getrusage, whose peak is inherited from the process that started this one.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    return None if found is None else 1024 * int(found.group(1))


def _run(model: str, arrays: str, kind: str | None = None) -> None:
    inputs = load_file(arrays)
    if kind is None:
        import onnxruntime

        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        session.run(None, {entry.name: inputs[entry.name] for entry in session.get_inputs()})
    else:
        import torch
        import transformers

        student = getattr(transformers, kind).from_pretrained(model).eval()
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        with torch.inference_mode():
            student(**{name: v.to(student.dtype) if v.is_floating_point() else v for name, v in tensors.items()})
    print("peak", own_peak())


if __name__ == "__main__":
    _run(*sys.argv[1:])
