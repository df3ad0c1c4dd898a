"""The memory that a trainer tells before training, against what its process grows by: a process for each measurement.

It begins after the libraries and a training of models a few thousand parameters small. Measured is the highest
resident memory until the end of three steps: with malloc as it is, and where it gives every tensor pages of its own
and takes them back, so that nothing is lost in between. Told is `MemoryEstimate.total`. Linux with glibc only.

    python scripts/benchmark_memory.py                       # adds a round of all rows, a few minutes
    python scripts/benchmark_memory.py --cases gpt2-4x256:8 --output outputs/memory.json
    python scripts/benchmark_memory.py --table               # measures nothing
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import conditions
import torch
from datasets import Dataset
from step_cost.memory import current_bytes, peak_bytes, reset_peak
from step_cost.pairs import NAMES, find_pair
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.utils import logging

from hf_semckd import SemCKDConfig, SemCKDTrainer

RESULTS = Path(__file__).resolve().parent / "results" / "memory.json"
GPT2 = "gpt2-4x256"
GPT2_VOCABULARY, GPT2_LENGTH = 50257, 128
# Pair and samples of a micro-batch.
CASES = tuple(
    f"{pair}:{samples}"
    for pair, sizes in (
        ("bert-6x384", (4, 16)),
        ("vit-12x192", (2, 8)),
        ("resnet34-18", (4, 16)),
        ("resnet32x4-8x4", (16, 64)),
        (GPT2, (4,)),
    )
    for samples in sizes
)
STEPS = 3
# Of glibc: blocks above a page or so are mapped and unmapped one by one (mallopt(3), M_MMAP_THRESHOLD).
MALLOCS = {"as_it_is": {}, "pages": {"MALLOC_MMAP_THRESHOLD_": str(2**16)}}
Parts = tuple[PreTrainedModel, PreTrainedModel, dict[str, torch.Tensor]]


def main() -> None:
    """Measure all rows, or one of them where the script itself asks for it."""
    options = parse()
    if options.case is not None:
        print(json.dumps(measure(options.case, options.threads)))
        return
    for case in [] if options.table else options.cases * options.rounds:
        found = {malloc: measure_elsewhere(case, malloc, options.threads) for malloc in MALLOCS}
        conditions.add_round(options.output, case, found, options.threads)
    print(table(options.output))


def table(path: Path = RESULTS) -> str:
    """Return the stored measurements in MB, and as a share of what was told: medians."""
    stored = json.loads(path.read_text("utf-8"))
    lines = ["| pair | samples | told | pages of their own | share | malloc | share | rounds |", "|" + "---|" * 8]
    for case in [*(case for case in CASES if case in stored), *(case for case in stored if case not in CASES)]:
        runs = stored[case]["runs"]
        told = statistics.median(run["told_bytes"] for run in runs["pages"])
        cells = [*case.split(":"), f"{told / 1e6:,.0f} MB"]
        for malloc in ("pages", "as_it_is"):
            measured = statistics.median(run["measured_bytes"] for run in runs[malloc])
            cells += [f"{measured / 1e6:,.0f} MB", f"{measured / told:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {len(runs['pages'])} |")
    return "\n".join(lines)


def measure_elsewhere(case: str, malloc: str, threads: int) -> dict[str, Any]:
    """Run `measure` in a process of its own, with one of `MALLOCS`."""
    words = [sys.executable, __file__, "--case", case, "--threads", str(threads)]
    environment = {**os.environ, **MALLOCS[malloc]}
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: str, threads: int) -> dict[str, Any]:
    """Return what a trainer tells of a case before training, and the growth of this process, in bytes."""
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    name, samples = case.split(":")
    with tempfile.TemporaryDirectory() as folder:
        _train(make(name, 2, tiny=True), 2, folder)
        gc.collect()
        how, before = reset_peak("cpu"), current_bytes("cpu")
        told = _train(make(name, int(samples), tiny=False), int(samples), folder)
        return {"told_bytes": told, "measured_bytes": peak_bytes("cpu", how) - before, "how": how}


def make(name: str, samples: int, tiny: bool) -> Parts:
    """Return teacher, student and a batch of a pair."""
    if name != GPT2:
        pair = replace(find_pair(name, tiny=tiny), batch_size=samples)
        return pair.make_teacher(), pair.make_student(), pair.make_batches(1)[0]
    torch.manual_seed(0)
    sizes = ((2, 32), (2, 16)) if tiny else ((12, 512), (4, 256))
    vocabulary, length = (100, 16) if tiny else (GPT2_VOCABULARY, GPT2_LENGTH)
    shared = {"vocab_size": vocabulary, "n_positions": length, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    teacher, student = (GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, **shared)) for layers, width in sizes)
    tokens = torch.randint(vocabulary, (samples, length))
    return teacher, student, {"input_ids": tokens, "labels": tokens}


def _train(parts: Parts, samples: int, folder: str) -> int:
    """Train, and return what was told before the first step."""
    teacher, student, batch = parts
    rows = Dataset.from_dict({key: value.numpy() for key, value in batch.items()}).with_format("torch")
    args = SemCKDConfig(
        output_dir=folder,
        per_device_train_batch_size=samples,
        num_train_epochs=STEPS,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = SemCKDTrainer(student, args, teacher_model=teacher, train_dataset=rows)
    told = trainer.distillation.memory(samples, args, None).total
    trainer.train()
    return told


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pairs = ", ".join([*NAMES, GPT2])
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="PAIR:SAMPLES", help=f"Pairs: {pairs}.")
    parser.add_argument("--rounds", type=int, default=1, help="Processes of each row; %(default)s.")
    parser.add_argument("--threads", type=int, default=1, help="%(default)s.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="The JSON file.")
    parser.add_argument("--table", action="store_true", help="Print the table of the stored file.")
    # What the script runs in a process of its own.
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
