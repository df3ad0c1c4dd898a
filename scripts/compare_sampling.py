"""Check on real data that comparing some of the tokens and small maps costs no accuracy: paired runs, same seeds.

    python scripts/compare_sampling.py                          # all protocols, ten seeds; an hour on one thread
    python scripts/compare_sampling.py digits --seeds 10 11 12  # some of it
    python scripts/compare_sampling.py --table-only             # the table of the rows that are there

Every seed trains the same student twice from the same start: with everything compared (`max_tokens=0`,
`max_grid=0`, a projection for every student layer) and with the library's defaults. Rows are kept in
scripts/results/sampling/<protocol>.jsonl, one a run; runs that are there are not repeated. Needs scikit-learn; for
`fashion` the Debian package dataset-fashion-mnist, for `text` what scripts/fetch_text_parts.py fetches.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import sources
from accuracy.data import Rows, collate, texts
from accuracy.models import COMMON, QUIET, accuracy, make_model, trained_teacher
from accuracy.rows import OUTPUTS
from accuracy.statistics import compare
from markdown_tables import format_markdown_table
from transformers.trainer_callback import PrinterCallback

from hf_semckd import SemCKDConfig, SemCKDTrainer
from hf_semckd.publishing.facts import environment

RESULTS = Path(__file__).resolve().parent / "results" / "sampling"
SEEDS = list(range(10, 20))
VARIANTS: dict[str, dict[str, Any]] = {"everything": {"max_tokens": 0, "max_grid": 0}, "default": {}}
COLUMNS = ("protocol", "seeds", "everything %", "default %", "default - everything", "95 % interval")


@dataclass(frozen=True)
class Protocol:
    """What is trained on what.

    Attributes:
        load: Returns the rows to train and to test on.
        most: How many of them the teacher trains on and both are tested on; None: all.
        count: How many of the teacher's a student trains on, others for each seed.
        teacher: See `accuracy.models.make_model`.
        student: The same.
        teacher_args: How the teacher trains.
        args: How students train.
    """

    load: Callable[[], tuple[Rows, Rows]]
    most: tuple[int | None, int | None]
    count: int
    teacher: Mapping[str, Any]
    student: Mapping[str, Any]
    teacher_args: Mapping[str, Any]
    args: Mapping[str, Any]


def images(load: Callable[[], sources.Source], mean: float, deviation: float, channels: int) -> tuple[Rows, Rows]:
    """Return normalized images to train and to test on, gray ones repeated over the channels."""
    source = load()

    def rows(split: str) -> Rows:
        pixels = torch.from_numpy(source.inputs[split].astype(np.float32) / 255)
        values = ((pixels - mean) / deviation).unsqueeze(1).repeat(1, channels, 1, 1)
        return Rows({"pixel_values": values, "labels": torch.from_numpy(source.labels[split])}, source.classes)

    return rows("train"), rows("test")


def snippets() -> tuple[Rows, Rows]:
    """Return movie snippets of 64 tokens at most."""
    train, _, test = texts(sources.movie_snippets(), 64)
    return train, test


def shuffled(rows: Rows, count: int | None, seed: int) -> Rows:
    """Return some of the rows in a random order."""
    return rows if count is None else rows.take(np.random.default_rng(seed).permutation(len(rows))[:count])


def sized(epochs: int, rate: float, batch: int, decay: float = 0.05) -> dict[str, Any]:
    """Return training arguments."""
    return {
        "num_train_epochs": epochs,
        "learning_rate": rate,
        "per_device_train_batch_size": batch,
        "weight_decay": decay,
    }


def digits(patch: int) -> Protocol:
    """ViT on scikit-learn's digits, as in examples/distill_vit.py but for the patches: of 1 they give 65 tokens."""
    vit = {"family": "vit", "size": 8, "patch": patch, "expansion": 4}
    return Protocol(
        load=lambda: images(sources.digits, 0.5, 0.5, channels=3),
        most=(None, None),
        count=300,
        teacher={"name": "vit-6x96", **vit, "depth": 6, "width": 96},
        student={"name": "vit-3x48", **vit, "depth": 3, "width": 48},
        teacher_args=sized(20, 1e-3, 32),
        args=sized(80, 2e-3, 32),
    )


PROTOCOLS = {
    "digits-65-tokens": digits(1),
    # ViT on Fashion-MNIST in patches of 2 x 2 pixels: 197 tokens as in a full-size ViT, 100 labels a class.
    "fashion-197-tokens": Protocol(
        load=lambda: images(sources.fashion_mnist, 0.5, 0.5, channels=3),
        most=(8000, 2000),
        count=1000,
        teacher={"name": "vit-6x48", "family": "vit", "size": 28, "patch": 2, "expansion": 4, "depth": 6, "width": 48},
        student={"name": "vit-3x24", "family": "vit", "size": 28, "patch": 2, "expansion": 4, "depth": 3, "width": 24},
        teacher_args=sized(4, 2e-3, 64),
        args=sized(15, 4e-3, 64),
    ),
    # ResNet on Fashion-MNIST: a student of 14 x 14, 7 x 7 and 4 x 4 cells, 100 labels a class.
    "fashion-maps": Protocol(
        load=lambda: images(sources.fashion_mnist, 0.286, 0.353, channels=1),
        most=(20000, 5000),
        count=1000,
        teacher={"name": "resnet-2x32", "family": "resnet", "width": 32, "depth": 2, "pooled": False},
        student={"name": "resnet-1x8", "family": "resnet", "width": 8, "depth": 1, "pooled": False},
        teacher_args=sized(5, 2e-3, 64),
        args=sized(20, 4e-3, 64),
    ),
    # MiniLM-L6, fine-tuned on movie snippets, to a new BERT of two layers, as in examples/distill_text.py.
    "text": Protocol(
        load=snippets,
        most=(None, None),
        count=2000,
        teacher={"name": "minilm-l6", "family": "minilm"},
        student={"name": "bert-2x128", "family": "bert", "depth": 2, "width": 128, "length": 64},
        teacher_args={"num_train_epochs": 1, "learning_rate": 1e-4, "per_device_train_batch_size": 32},
        # Random as when the kept rows were made; on text the default is zero now.
        args={**sized(8, 1e-3, 32, decay=0.01), "feature_weight": 10.0, "projection_init": "random"},
    ),
}


def run(protocol: Protocol, teacher: Any, rows: Rows, test: Rows, variant: str, seed: int) -> dict[str, Any]:
    """Train one student and return its accuracy."""
    student = make_model(protocol.student, rows, seed)
    with tempfile.TemporaryDirectory() as folder:
        args = {**QUIET, **COMMON, "logging_strategy": "no", **protocol.args, **VARIANTS[variant]}
        trainer = SemCKDTrainer(
            student,
            SemCKDConfig(output_dir=folder, seed=seed, use_cpu=True, teacher_cache_dir=folder, **args),
            teacher_model=copy.deepcopy(teacher),
            train_dataset=shuffled(rows, protocol.count, seed),
            data_collator=collate,
        )
        trainer.remove_callback(PrinterCallback)
        own = trainer.feature_loss.comparison.projection_of
        if variant == "everything" and max(own) + 1 < len(trainer.student_layer_names):
            raise SystemExit("The student is so small that its layers share projections: that is no full comparison.")
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    return {"variant": variant, "seed": seed, "accuracy": accuracy(student, test), "seconds": round(seconds, 1)}


def read_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows that were kept for a protocol."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def run_protocol(name: str, seeds: Sequence[int]) -> None:
    """Run what is not there yet, and keep every row as soon as it is known."""
    done = {(row["variant"], row["seed"]) for row in read_rows(name)}
    missing = [(variant, seed) for seed in seeds for variant in VARIANTS if (variant, seed) not in done]
    if not missing:
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    protocol = PROTOCOLS[name]
    train, test = (shuffled(rows, count, 0) for rows, count in zip(protocol.load(), protocol.most, strict=True))
    teacher = trained_teacher({"name": name}, protocol.teacher, protocol.teacher_args, train, outputs=OUTPUTS)
    for variant, seed in missing:
        row = {"protocol": name, **run(protocol, teacher, train, test, variant, seed)}
        row |= {"args": dict(protocol.args), "environment": environment()}
        with (RESULTS / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name} {variant} seed {seed}: {100 * row['accuracy']:.2f} %", file=sys.stderr, flush=True)


def summarize(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, object]:
    """Return one line: both accuracies, their paired difference and its 95 % interval, in points."""
    values = {
        kind: {row["seed"]: 100 * row["accuracy"] for row in rows if row["variant"] == kind} for kind in VARIANTS
    }
    seeds = sorted(set(values["everything"]) & set(values["default"]))
    found = compare(name, "default", "everything", values["default"], values["everything"])
    cells = (
        name,
        len(seeds),
        *(f"{statistics.mean(values[kind][seed] for seed in seeds):.2f}" for kind in VARIANTS),
        f"{found.mean:+.2f} ± {found.std:.2f}",
        f"{found.interval[0]:+.2f} to {found.interval[1]:+.2f}",
    )
    return dict(zip(COLUMNS, cells, strict=True))


def table() -> str:
    """Return the Markdown table of the rows that were kept."""
    rows = {name: read_rows(name) for name in PROTOCOLS}
    return format_markdown_table([summarize(name, kept) for name, kept in rows.items() if len(kept) > 3], COLUMNS)


def main() -> None:
    """Run the chosen protocols and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocols", nargs="*", default=[], metavar="protocol", help=", ".join(PROTOCOLS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--table-only", action="store_true", help="Run nothing, print the table of the kept rows.")
    options = parser.parse_args()
    unknown = sorted(set(options.protocols) - set(PROTOCOLS))
    if unknown:
        parser.error(f"unknown protocol {', '.join(unknown)}; there are {', '.join(PROTOCOLS)}")
    if not options.table_only:
        for name in options.protocols or PROTOCOLS:
            run_protocol(name, options.seeds)
    print(table())


if __name__ == "__main__":
    main()
