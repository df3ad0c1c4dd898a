"""Measure what a distillation step costs, through the real trainers, and print the table.

    python scripts/benchmark_step.py                                   # everything: hours, most of it for "published"
    python scripts/benchmark_step.py --pairs bert-6x384 --variants ce kd semckd
    python scripts/benchmark_step.py --device cuda --batch-size 128    # bfloat16 autocast, a batch that fills a GPU
    python scripts/benchmark_step.py --growth                          # only: how the loss's own time grows
    python scripts/benchmark_step.py --table scripts/results/step/NAME.json    # the table of a stored measurement
    python scripts/benchmark_step.py --quick                           # tiny models: does the measurement work?

Pairs are models of real sizes with random weights on random data. The variants:

    ce         the student alone, plain Trainer
    kd         DistillationTrainer without features: labels and the teacher's logits
    semckd     SemCKDTrainer as it comes
    published  SemCKDConfig.published; left out, and said so, where it does not fit into memory
    cached     semckd with the teacher's outputs in teacher_cache_dir, where they are before the first measured step

A step is what Trainer.train does with a micro-batch (counting, statistics, forward, backward, zero_grad), without the
optimizer's part, which is timed among the parts. All variants live in one process, share the teacher and step in turn
with the same batch; ratios are taken within a round, then their median and quartiles. Peak memory is that of whole
training steps, optimizer included, each variant in a process of its own; on a GPU, what torch allocated. Leave the
machine alone meanwhile: where others took the processor, the table says so.

Writes scripts/results/step/<machine>.json (pairs in it that do not run again stay) and a picture beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import conditions
import torch
from step_cost import growth, measure, memory, pairs, picture, summary, variants

from hf_semckd.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "results" / "step"
QUICK_OUTPUT = ROOT / "outputs" / "step" / "quick.json"
ROUNDS, QUICK_ROUNDS = 9, 2


def main() -> None:
    """Measure the chosen pairs or the growth, and print the table."""
    options = parse()
    if options.table is not None:
        show(json.loads(options.table.read_text()))
        return
    torch.set_num_threads(options.threads)
    if options.memory_of is not None:
        pair, variant = options.memory_of
        found = pairs.find_pair(pair, options.quick, options.batch_size)
        print(json.dumps(memory.measure_peak(found, variant, options.device)))
        return
    stored = json.loads(options.output.read_text()) if options.output.is_file() else {}
    if options.growth:
        add_growth(stored, options)
    else:
        add_pairs(stored, options)
        draw(stored, options.output.with_suffix(".png"))
    print(f"written: {options.output}", file=sys.stderr)
    show(stored)


def add_pairs(stored: dict[str, Any], options: argparse.Namespace) -> None:
    """Measure the chosen pairs, and write the file after each."""
    arguments = [
        "--threads",
        str(options.threads),
        "--device",
        options.device,
        *(["--quick"] if options.quick else []),
        *(["--batch-size", str(options.batch_size)] if options.batch_size else []),
    ]
    for index, name in enumerate(options.pairs):
        record = measure.measure_pair(
            pairs.find_pair(name, options.quick, options.batch_size), options.variants, options.device, options.rounds
        )
        # A quick run has no time for more: every variant is a process that imports everything anew.
        wanted = options.variants if not options.quick else ("kd", "semckd") if index == 0 else ()
        record["memory"] = measure.measure_memory(name, record, wanted, options.device, arguments)
        record["targets"] = summary.targets_of(record)
        record["conditions"] = conditions.conditions(options.device)
        found = {**stored.get("pairs", {}), record["pair"]: record}
        stored["pairs"] = {key: found[key] for key in sorted(found, key=pairs.place_of)}
        write_json(options.output, stored)


def add_growth(stored: dict[str, Any], options: argparse.Namespace) -> None:
    """Measure how the feature loss's own time grows, and write the file after each form."""
    for form in growth.FORMS:
        axes = growth.measure_growth(form, options.device, options.rounds, options.quick)
        record = {"axes": axes, "conditions": conditions.conditions(options.device)}
        key = f"{form} (tiny)" if options.quick else form
        stored["growth"] = {**stored.get("growth", {}), key: record}
        write_json(options.output, stored)


def show(stored: Mapping[str, Any]) -> None:
    """Print the tables of a stored measurement."""
    print(summary.table(stored))
    parts = summary.parts_table(stored)
    if parts:
        print(f"\nParts of a step, as shares of a KD step:\n\n{parts}")


def draw(stored: Mapping[str, Any], path: Path) -> None:
    """Draw the picture, or say that it would show nothing."""
    if not any("kd" in record["seconds"] for record in stored["pairs"].values()):
        print("no picture: it shows times relative to kd, which was not measured", file=sys.stderr)
        return
    picture.draw(stored, path)


def parse() -> argparse.Namespace:
    """Read the command line, and fill in what depends on the rest of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--pairs", choices=pairs.NAMES, default=pairs.NAMES, help=_any_of(pairs.NAMES), **several)
    parser.add_argument(
        "--variants", choices=variants.NAMES, default=variants.NAMES, help=_any_of(variants.NAMES), **several
    )
    parser.add_argument("--rounds", type=_positive, help=f"Measured rounds; {ROUNDS}, or {QUICK_ROUNDS} with --quick.")
    parser.add_argument("--batch-size", type=_positive, help="Samples in a micro-batch; each pair's own.")
    parser.add_argument("--threads", type=_positive, default=1, help="Threads of a CPU; 1.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="Tiny models and few rounds; writes to outputs/step.")
    parser.add_argument("--growth", action="store_true", help="Measure only the growth of the feature loss's time.")
    parser.add_argument("--output", type=Path, help="The JSON file.")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="Measure nothing, print the table of a stored file."
    )
    # What the script runs in a process of its own; see step_cost/memory.py.
    parser.add_argument("--memory-of", nargs=2, metavar=("PAIR", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table is not None and not options.table.is_file():
        parser.error(f"there is no file {options.table}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; leave --device out to measure on the CPU")
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    default = (
        QUICK_OUTPUT if options.quick else RESULTS / f"{conditions.file_name(options.device, options.threads)}.json"
    )
    options.output = options.output or default
    return options


def _any_of(names: Sequence[str]) -> str:
    return f"Any of {', '.join(names)}; all of them."


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


if __name__ == "__main__":
    main()
