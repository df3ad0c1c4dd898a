"""Record short trainings with every part of the library, and compare two recordings bit for bit.

    python scripts/golden_runs.py record before                # a minute and a half on one core
    python scripts/golden_runs.py record after --only text cnn
    python scripts/golden_runs.py compare before after         # exit code 1 where a difference exceeds --tolerance
    python scripts/golden_runs.py list

`record` runs the `hf_semckd` that is imported: set PYTHONPATH to the source tree. A run is six optimizer steps on the
CPU (float32, one thread): FOLDER/<run>.json holds all logged terms, FOLDER/<run>.safetensors the student's final
weights and the association. Recordings of one machine and one environment are comparable, others to rounding.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from golden_cases import FAMILIES, PROCESSES, RUNS, Run, collate
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, set_seed
from transformers.utils import logging

import hf_semckd
from hf_semckd import DistillationTrainer, SemCKDConfig, SemCKDTrainer

STEPS, HALF = 6, 3
# The names of a package from before they were changed, which knows none of the new ones.
OLD_FIELDS = {
    "max_tokens": "token_limit",
    "max_grid": "grid_limit",
    "projection_init": "projection_start",
    "projection_learning_rate": "calibration_learning_rate",
}
OLD_VALUES = {"sinkhorn": "matching"}
IS_NEW = "max_tokens" in SemCKDConfig.__dataclass_fields__
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "max_steps": STEPS,
    # Adam normalizes gradients by their own size, which amplifies those that are zero up to rounding.
    "optim": "sgd",
    "learning_rate": 0.05,
    "dataloader_pin_memory": False,
    "dataloader_num_workers": 0,
}


class Crash(TrainerCallback):
    """Ends a training with an error, after its first checkpoint."""

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Raise `InterruptedError`."""
        raise InterruptedError


def make(run: Run, folder: Path, callbacks: Sequence[TrainerCallback] = ()) -> DistillationTrainer:
    """Return a trainer of new objects that writes to a folder."""
    family, settings = FAMILIES[run.family], {**SETTINGS, **run.args}
    if run.how in ("cached", "full", "filled"):
        settings["teacher_cache_dir"] = str(folder / "cache")
    if run.how == "resumed":
        settings |= {"save_strategy": "steps", "save_steps": HALF}
    teacher: Any = family.teacher()
    if run.teacher_folder:
        teacher.save_pretrained(folder / "teacher")
        teacher = str(folder / "teacher")
    parts: dict[str, Any] = {
        "model": family.student(),
        "teacher_model": teacher,
        "args": (SemCKDConfig.published if run.published else SemCKDConfig)(str(folder), **known(settings)),
        "train_dataset": family.rows(),
        "eval_dataset": family.rows(),
        "data_collator": collate,
        "callbacks": list(callbacks),
    }
    return SemCKDTrainer(**parts) if run.method == "semckd" else DistillationTrainer(**parts, feature_loss=run.method)


def known(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings under the names of the package at hand."""
    if IS_NEW:
        return settings
    renamed = {OLD_FIELDS.get(name, name): value for name, value in settings.items()}
    if "association" in renamed:
        renamed["association"] = OLD_VALUES.get(renamed["association"], renamed["association"])
    return renamed


def train(run: Run, folder: Path) -> DistillationTrainer:
    """Return the trainer after its training."""
    set_seed(0)
    checkpoint = None
    if run.how == "full":
        make(run, folder).train()
    if run.how == "filled":
        make(run, folder).fill_teacher_cache()
    if run.how == "resumed":
        with suppress(InterruptedError):
            make(run, folder, [Crash()]).train()
        checkpoint = str(folder / f"checkpoint-{HALF}")
    PartialState().wait_for_everyone()
    trainer = make(run, folder)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def recording(run: Run, trainer: DistillationTrainer) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return the log and the tensors of a training.

    Raises:
        RuntimeError: When the run cannot show anything: too few processes or steps, not finite, a student that did not
            move.
    """
    log = [
        {name: value for name, value in row.items() if not name.endswith(("_runtime", "_per_second"))}
        for row in trainer.state.log_history
    ]
    student, start = trainer.student.state_dict(), FAMILIES[run.family].student().state_dict()
    tensors = {f"student/{name}": value.detach().clone().contiguous() for name, value in student.items()}
    association = trainer.association()
    if association is not None:
        tensors["association"] = torch.from_numpy(association)
    steps = [row for row in log if "loss" in row]
    expected = {
        "processes": trainer.accelerator.num_processes == run.processes,
        "steps": len(steps) == STEPS,
        "feature loss": run.method is None or any(row["feature_loss"] > 0 for row in steps),
        "finite": all(value.isfinite().all() for value in tensors.values()),
        "plain student that moved": student.keys() == start.keys()
        and not all(torch.equal(value, start[name]) for name, value in student.items()),
    }
    if not all(expected.values()):
        raise RuntimeError(f"not as expected: {[name for name, right in expected.items() if not right]}")
    return log, tensors


def record(folder: Path, names: Sequence[str], work: Path) -> bool:
    """Run and write the recordings, those of several processes under torchrun; return whether all went well."""
    spawned, well = "WORLD_SIZE" in os.environ, True
    shared = [name for name in names if RUNS[name].processes > 1]
    if not spawned:
        print(f"recording with {Path(hf_semckd.__file__).parent}", flush=True)
    for name in names if spawned else [name for name in names if name not in shared]:
        (work / name).mkdir(exist_ok=True)
        began, (log_file, tensor_file) = time.monotonic(), files(folder, name)
        try:
            with redirect_stdout(io.StringIO()):
                trainer = train(RUNS[name], work / name)
            log, tensors = recording(RUNS[name], trainer)
        except Exception:
            if spawned:  # the other process would wait
                raise
            traceback.print_exc()
            print(f"{name:24}failed", flush=True)
            well = False
            continue
        if trainer.is_world_process_zero():
            save_file(tensors, tensor_file)
            log_file.write_text(json.dumps(log, indent=1, sort_keys=True) + "\n")
            print(f"{name:24}{time.monotonic() - began:5.1f} s", flush=True)
    if shared and not spawned:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
        command = [*launcher, __file__, "record", str(folder), "--work", str(work), "--only", *shared]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        well = subprocess.run(command, env=environment, check=False).returncode == 0 and well
    return well


def files(folder: Path, name: str) -> tuple[Path, Path]:
    """Return the files of a recording: the log and the tensors."""
    return folder / f"{name}.json", folder / f"{name}.safetensors"


def read(folder: Path, name: str) -> dict[str, dict[str, Tensor]]:
    """Return the values of a recording by group (`curve`, `student`, `association`) and name."""
    log_file, tensor_file = files(folder, name)
    groups: dict[str, dict[str, Tensor]] = {"curve": {}, "student": {}, "association": {}}
    for key, tensor in load_file(tensor_file).items():
        groups[key.split("/")[0]][key] = tensor
    log = json.loads(log_file.read_text())
    for term in {term: None for row in log for term in row}:
        values = torch.tensor([row[term] for row in log if term in row], dtype=torch.float64)
        groups["association" if term == "association" else "curve"][f"logged {term}"] = values
    return groups


def difference(before: Tensor | None, after: Tensor | None) -> float:
    """Return the largest difference of two tensors, relative to values above 1; infinite where they do not match."""
    if before is None or after is None or before.shape != after.shape or before.dtype != after.dtype:
        return math.inf
    gap = (before.double() - after.double()).abs() / before.double().abs().clamp(min=1)
    return math.inf if gap.isnan().any() else float(gap.max())


def compare(before: Path, after: Path, names: Sequence[str], tolerance: float) -> bool:
    """Print how two recordings differ; return whether all differences are within the tolerance."""
    differences = []
    for name in names:
        pairs = list(zip(files(before, name), files(after, name), strict=True))
        if not all(path.is_file() for pair in pairs for path in pair):
            differences.append(math.inf)
            print(f"{name:24}not recorded in both folders")
        elif all(one.read_bytes() == other.read_bytes() for one, other in pairs):
            print(f"{name:24}bit-identical")
        else:
            cells = []
            for (group, one), other in zip(read(before, name).items(), read(after, name).values(), strict=True):
                gaps = {key: difference(one.get(key), other.get(key)) for key in one | other}
                gap, where = max(((gap, key) for key, gap in gaps.items()), default=(0.0, ""))
                differences.append(gap)
                cells.append(f"{group} {gap:.1e}" + (f" ({where})" if gap else ""))
            print(f"{name:24}{'   '.join(cells)}")
    worst = max(differences, default=0.0)
    verdict = f"largest difference {worst:.1e}, tolerance {tolerance:g}" if differences else "all bit-identical"
    print(f"{len(names)} runs: {verdict}")
    return worst <= tolerance


def main() -> bool:
    """Record, compare or list; return whether all went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recorder, comparer = commands.add_parser("record"), commands.add_parser("compare")
    commands.add_parser("list")
    recorder.add_argument("folder", type=Path)
    recorder.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    comparer.add_argument("before", type=Path)
    comparer.add_argument("after", type=Path)
    comparer.add_argument("--tolerance", type=float, default=0.0, help="Largest difference that is let through.")
    for command in (recorder, comparer):
        command.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="NAME")
    options = parser.parse_args()
    if options.command == "list":
        print("\n".join(RUNS))
        return True
    if options.command == "compare":
        return compare(options.before, options.after, options.only, options.tolerance)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        return record(options.folder, options.only, options.work or Path(work))


if __name__ == "__main__":
    sys.exit(not main())
