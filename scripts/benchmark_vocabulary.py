"""Memory and time of task and logit loss with a large vocabulary: from hidden states in chunks, and with all logits.

Forward and backward of the two losses alone, of random hidden states and heads at temperature 1: each measurement is
one pass in a process of its own, the forms in turn. Memory is the resident peak above heads and hidden states, time
the processor's.

    python scripts/benchmark_vocabulary.py                  # adds rounds of all cases, about half an hour
    python scripts/benchmark_vocabulary.py --cases 1024x4096x512 --rounds 3 --output outputs/vocabulary.json
    python scripts/benchmark_vocabulary.py --table          # measures nothing
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conditions
import torch
import torch.nn.functional as F
from step_cost.memory import current_bytes, peak_bytes, reset_peak
from torch import Tensor, nn

from hf_semckd.losses.fused_linear import LanguageDistillation, TokenRows, fused_linear_losses
from hf_semckd.losses.logits import logit_loss_sum
from hf_semckd.models.language_head import LanguageHead

FORMS = ("dense", "fused")
# Positions x vocabulary x width of the student.
CASES = ("1024x131072x512", "1024x131072x1024", "1024x16384x512", "1024x4096x512", "256x4096x512")
TEACHER_WIDTH = 1024
RESULTS = Path(__file__).resolve().parent / "results" / "vocabulary.json"


def main() -> None:
    """Measure the forms in turn, or one of them where the script itself asks for it."""
    options = parse()
    if options.form is not None:
        print(json.dumps(measure(options.form, options.cases[0], options.chunk_size, options.threads)))
        return
    for case in [] if options.table else options.cases * options.rounds:
        found = {form: measure_elsewhere(form, case, options) for form in FORMS}
        conditions.add_round(options.output, case, found, options.threads)
    print(table(options.output))


def table(path: Path = RESULTS) -> str:
    """Return the stored measurements as a table: medians, and of the ratios of neighboring runs also the range."""
    lines = [
        "| positions | vocabulary | student's width | peak, all logits | chunks | ratio | time, all logits | chunks "
        "| ratio | rounds |",
        "|" + "---|" * 10,
    ]
    for case, record in json.loads(path.read_text("utf-8")).items():
        cells = case.split("x")
        for key, unit, scale in (("peak_bytes", "MB", 1e6), ("seconds", "s", 1.0)):
            dense, fused = ([run[key] / scale for run in record["runs"][form]] for form in FORMS)
            ratios = [one / other for one, other in zip(fused, dense, strict=True)]
            digits = 0 if unit == "MB" else 2
            cells += [f"{statistics.median(values):,.{digits}f} {unit}" for values in (dense, fused)]
            cells.append(f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
        lines.append(f"| {' | '.join(cells)} | {len(record['runs'][FORMS[0]])} |")
    return "\n".join(lines)


def measure_elsewhere(form: str, case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run `measure` in a process of its own, so that no form inherits another's memory."""
    words = ["--form", form, "--cases", case, "--threads", str(options.threads)]
    words += [] if options.chunk_size is None else ["--chunk-size", str(options.chunk_size)]
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(form: str, case: str, chunk_size: int | None, threads: int) -> dict[str, Any]:
    """Return the peak of a form in bytes above the start, and its processor time in seconds."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # A small pass first: libraries load, and threads start.
    step(form, 8, 64, 16, None)()
    positions, vocabulary, width = map(int, case.split("x"))
    run = step(form, positions, vocabulary, width, chunk_size)
    how, before, start = reset_peak("cpu"), current_bytes("cpu"), time.process_time()
    run()
    return {"seconds": time.process_time() - start, "peak_bytes": peak_bytes("cpu", how) - before, "how": how}


def step(form: str, positions: int, vocabulary: int, width: int, chunk_size: int | None) -> Callable[[], float]:
    """Return a function that computes the losses of one row of text and their gradients, and returns their sum."""
    student, teacher = (nn.Linear(size, vocabulary, bias=False) for size in (width, TEACHER_WIDTH))
    teacher.requires_grad_(False)
    hidden = torch.randn(1, positions, width, requires_grad=True)
    theirs, labels = torch.randn(1, positions, TEACHER_WIDTH), torch.randint(vocabulary, (1, positions))
    factor = torch.tensor(1.0 / (positions - 1))

    def dense() -> Tensor:
        logits = student(hidden)
        with torch.no_grad():
            taught = teacher(theirs)
        # As `transformers.loss.loss_utils.ForCausalLMLoss` computes it.
        task = F.cross_entropy(logits.float().view(-1, vocabulary), F.pad(labels, (0, 1), value=-100)[0, 1:])
        return task + logit_loss_sum(logits, taught, {"labels": labels}, 1.0, "tokens", True) * factor

    def fused() -> Tensor:
        shifted = F.pad(labels, (0, 1), value=-100)[0, 1:]
        rows = TokenRows(hidden.flatten(0, 1), theirs.flatten(0, 1), shifted, (shifted != -100).float())
        heads = LanguageHead(student), LanguageHead(teacher)
        distillation = LanguageDistillation(*heads, temperature=1.0, chunk_size=chunk_size)
        return fused_linear_losses(rows, distillation, factor, factor).total

    def run() -> float:
        total = {"dense": dense, "fused": fused}[form]()
        total.backward()
        student.weight.grad = hidden.grad = None
        return float(total.detach())

    return run


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="NxVxD", help=f"As {', '.join(CASES)}.")
    parser.add_argument("--chunk-size", type=int, help="Positions in a chunk; the library's choice.")
    parser.add_argument("--rounds", type=int, default=5, help="Processes of each form; %(default)s.")
    parser.add_argument("--threads", type=int, default=1, help="%(default)s.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="The JSON file.")
    parser.add_argument("--table", action="store_true", help="Print the table of the stored file.")
    # What the script runs in a process of its own.
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
