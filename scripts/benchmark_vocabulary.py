"""Memory and time of task and logit loss with a large vocabulary: from hidden states in chunks, and densely.

Forward and backward of the two losses alone, from random hidden states and heads, each measurement in a process of its
own, the forms in turn. Memory is the resident peak above what heads and hidden states take; time is the processor's.

    python scripts/benchmark_vocabulary.py
    python scripts/benchmark_vocabulary.py --positions 256 --vocabulary 8192 --rounds 9 --output outputs/small.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
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
SIZES = ("positions", "vocabulary", "width", "teacher_width", "chunk_size", "threads")


def main() -> None:
    """Measure the forms in turn, or one of them where the script itself asks for it."""
    options = parse()
    if options.form is not None:
        print(json.dumps(measure(options)))
        return
    runs: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
    for _ in range(options.rounds):
        for form in FORMS:
            runs[form].append(measure_elsewhere(form, options))
    sizes = {name: getattr(options, name) for name in SIZES}
    result = {"sizes": sizes, "runs": runs, "conditions": conditions.conditions("cpu")}
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(summary(sizes, runs))


def summary(sizes: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return medians of both forms, and of the ratios of neighboring runs with their range."""
    lines = [", ".join(f"{name} {value}" for name, value in sizes.items())]
    for key, unit, scale in (("peak_bytes", "MB", 1e6), ("seconds", "s", 1)):
        dense, fused = ([run[key] / scale for run in runs[form]] for form in FORMS)
        ratios = [one / other for one, other in zip(fused, dense, strict=True)]
        lines.append(
            f"{key}: dense {statistics.median(dense):.3f} {unit}, fused {statistics.median(fused):.3f} {unit}, ratio "
            f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}] of {len(ratios)}"
        )
    return "\n".join(lines)


def measure_elsewhere(form: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run `measure` in a process of its own, so that no form inherits another's memory."""
    sizes = [
        word
        for name in SIZES
        if getattr(options, name) is not None
        for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))
    ]
    command = [sys.executable, __file__, "--form", form, *sizes]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the peak of a form in bytes above the start, and the processor time of a second pass in seconds."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    # A small pass first: libraries load, and threads start.
    step(options.form, 8, 64, 16, 16, None)()
    run = step(
        options.form,
        options.positions,
        options.vocabulary,
        options.width,
        options.teacher_width,
        options.chunk_size,
    )
    how, before = reset_peak("cpu"), current_bytes("cpu")
    run()
    peak = peak_bytes("cpu", how) - before
    start = time.process_time()
    run()
    return {"peak_bytes": peak, "how": how, "seconds": time.process_time() - start}


def step(form: str, positions: int, vocabulary: int, width: int, teacher_width: int, chunk_size: int | None) -> Any:
    """Return a function that computes the losses of one row of text and their gradients."""
    student, teacher = (nn.Linear(size, vocabulary, bias=False) for size in (width, teacher_width))
    teacher.requires_grad_(False)
    hidden = torch.randn(1, positions, width, requires_grad=True)
    theirs, labels = torch.randn(1, positions, teacher_width), torch.randint(vocabulary, (1, positions))
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

    def run() -> None:
        {"dense": dense, "fused": fused}[form]().backward()
        student.weight.grad = hidden.grad = None

    return run


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=1024, help="Tokens; %(default)s.")
    parser.add_argument("--vocabulary", type=int, default=128 * 1024, help="Entries; %(default)s.")
    parser.add_argument("--width", type=int, default=512, help="Of the student's hidden states; %(default)s.")
    parser.add_argument("--teacher-width", type=int, default=1024, help="Of the teacher's; %(default)s.")
    parser.add_argument("--chunk-size", type=int, help="Positions in a chunk; the library's choice.")
    parser.add_argument("--rounds", type=int, default=5, help="Processes of each form; %(default)s.")
    parser.add_argument("--threads", type=int, default=1, help="%(default)s.")
    parser.add_argument("--output", type=Path, help="A JSON file for all that was measured.")
    # What the script runs in a process of its own.
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
