"""Is a student that starts from its teacher better than a new one, and which blocks should it keep?

    python scripts/study_students.py                           # all protocols, ten seeds
    python scripts/study_students.py text --seeds 3 4          # some of it
    python scripts/study_students.py --tune                    # learning rates, on the validation split and seed 100
    python scripts/study_students.py --starts                  # digits: what is left before any training
    python scripts/study_students.py --table-only              # the table of the rows that are there

Every seed draws other training rows and trains students of a third of the teacher's blocks with SemCKD: new ones, and
ones cut out of the teacher by each rule for the blocks that stay. Rows are kept in scripts/results/students; runs that
are there are not repeated. Needs what scripts/fetch_text_parts.py and scripts/fetch_image_parts.py fetch.
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

import torch
from accuracy import sources
from accuracy.data import LOADERS, Rows, collate
from accuracy.models import COMMON, QUIET, accuracy, trained_teacher
from accuracy.rows import OUTPUTS
from accuracy.statistics import compare
from compare_sampling import shuffled, sized
from markdown_tables import format_markdown_table, spread
from transformers.trainer_callback import PrinterCallback

from hf_semckd import SemCKDConfig, SemCKDTrainer, evaluate, make_student
from hf_semckd.publishing.facts import environment

RESULTS = Path(__file__).resolve().parent / "results" / "students"
SEEDS, TUNING_SEED = list(range(10)), 100
RATES = (1e-4, 3e-4, 1e-3)
CALIBRATION = 64
# What make_student is told of each kind of student.
VARIANTS: dict[str, dict[str, Any]] = {
    "new": {"init": "random"},
    "even": {},
    "change": {"importance": "change"},
    "loss": {"importance": "loss"},
}
COLUMNS = (
    "protocol",
    "student",
    "seeds",
    "parameters",
    "accuracy %",
    "minus new",
    "95 % interval",
    "share kept",
    "ms for 1",
)


# Of 6 blocks and 96 channels.
STARTS = [{"num_layers": 6}, {"num_layers": 4}, {"num_layers": 3}, {"num_layers": 2}, {"hidden_size": 72}]
STARTS_COLUMNS = ("what is left", "chosen by", "parameters", "accuracy %")


@dataclass(frozen=True)
class Protocol:
    """What is cut out of what, and trained on what.

    Attributes:
        load: Returns rows to train, to validate and to test on.
        count: Rows that a student trains on, others for each seed.
        blocks: Blocks that a student has.
        teacher, teacher_args: See `accuracy.models.trained_teacher`.
        args: How students train, but for the learning rate.
        rates: Learning rates of new students and of those from the teacher, found with `--tune`.
    """

    load: Callable[[], tuple[Rows, Rows, Rows]]
    count: int
    blocks: int
    teacher: Mapping[str, Any]
    teacher_args: Mapping[str, Any]
    args: Mapping[str, Any]
    rates: tuple[float, float]

    def rate(self, variant: str) -> float:
        """Return the learning rate of a kind of student."""
        return self.rates[variant != "new"]


def emoji() -> tuple[Rows, Rows, Rows]:
    """Return color images of 56 x 56 pixels."""
    parts = LOADERS["emoji"](size=56, teacher_size=56)
    kept = ("pixel_values", "labels")
    train, validation, test = (Rows({name: rows.columns[name] for name in kept}, rows.classes) for rows in parts)
    return train, validation, test


def digits() -> tuple[Rows, Rows, Rows]:
    """Return scikit-learn's digits, 8 x 8 pixels, as three channels."""
    source = sources.digits()

    def rows(split: str) -> Rows:
        pixels = torch.from_numpy(source.inputs[split]).float().div(127.5).sub(1.0)
        values = pixels.unsqueeze(1).repeat(1, 3, 1, 1)
        return Rows({"pixel_values": values, "labels": torch.from_numpy(source.labels[split])}, source.classes)

    train, validation, test = map(rows, sources.SPLITS)
    return train, validation, test


PROTOCOLS = {
    "digits": Protocol(
        load=digits,
        count=300,
        blocks=2,
        teacher={"name": "vit-6x96", "family": "vit", "size": 8, "patch": 2, "expansion": 4, "depth": 6, "width": 96},
        teacher_args=sized(20, 1e-3, 32),
        args=sized(30, 0.0, 32),
        rates=(1e-3, 3e-4),
    ),
    "text": Protocol(
        load=lambda: LOADERS["movie_snippets"](length=64),
        count=2000,
        blocks=2,
        teacher={"name": "minilm-l6", "family": "minilm"},
        teacher_args=sized(1, 1e-4, 32, decay=0.01),
        args=sized(3, 0.0, 32, decay=0.01),
        rates=(1e-3, 3e-4),
    ),
    "images": Protocol(
        load=emoji,
        count=1000,
        blocks=4,
        teacher={"name": "dinov2-small", "family": "dinov2"},
        teacher_args=sized(3, 5e-5, 32, decay=0.01),
        args=sized(5, 0.0, 32, decay=0.05),
        rates=(1e-4, 1e-3),
    ),
}


def train_student(protocol: Protocol, teacher: Any, rows: Rows, variant: str, seed: int, rate: float) -> Any:
    """Return a student of a kind, trained with SemCKD on rows of this seed."""
    chosen = shuffled(rows, protocol.count, seed)
    calibration = collate([chosen[place] for place in range(CALIBRATION)])
    torch.manual_seed(seed)
    student = make_student(teacher, num_layers=protocol.blocks, batch=calibration, report=False, **VARIANTS[variant])
    with tempfile.TemporaryDirectory() as folder:
        args = {**QUIET, **COMMON, "logging_strategy": "no", **protocol.args, "learning_rate": rate}
        trainer = SemCKDTrainer(
            student,
            SemCKDConfig(output_dir=folder, seed=seed, use_cpu=True, teacher_cache_dir=folder, **args),
            teacher_model=copy.deepcopy(teacher),
            train_dataset=chosen,
            data_collator=collate,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return student.eval()


def read_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows that were kept for a protocol."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def keep(name: str, row: Mapping[str, Any]) -> None:
    """Add a row to those of a protocol, and tell of it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    said = " ".join(str(row[key]) for key in ("protocol", "split", "variant", "rate"))
    print(f"{said} seed {row['seed']}: {100 * row['accuracy']:.2f} %", file=sys.stderr, flush=True)


def run_protocol(name: str, seeds: Sequence[int], variants: Sequence[str], tune: bool) -> None:
    """Run what is not there yet, and keep every row as soon as it is known."""
    protocol = PROTOCOLS[name]
    split = "tuning" if tune else "test"
    done = {(row["split"], row["variant"], row["seed"], row["rate"]) for row in read_rows(name)}
    runs = [
        (variant, seed, rate)
        for seed in ([TUNING_SEED] if tune else seeds)
        for variant in variants
        for rate in (RATES if tune else [protocol.rate(variant)])
        if (split, variant, seed, rate) not in done
    ]
    if not runs:
        return
    train, validation, test = protocol.load()
    teacher = trained_teacher({"name": name}, protocol.teacher, protocol.teacher_args, train, outputs=OUTPUTS)
    for variant, seed, rate in runs:
        started = time.perf_counter()
        student = train_student(protocol, teacher, train, variant, seed, rate)
        row = {"protocol": name, "split": split, "variant": variant, "seed": seed, "rate": rate}
        row |= {"seconds": round(time.perf_counter() - started, 1), "environment": environment()}
        keep(name, {**row, **measure(teacher, student, validation if tune else test, tune)})


def measure(teacher: Any, student: Any, rows: Rows, tune: bool) -> dict[str, Any]:
    """Return the accuracy; and, unless learning rates are sought, all that `evaluate` tells."""
    if tune:
        return {"accuracy": accuracy(student, rows)}
    found = evaluate(
        {"teacher": teacher, "student": student}, rows, data_collator=collate, onnx=False, memory=False, seconds=2.0
    )
    kinds = {kind: found.row(kind) for kind in ("teacher", "student")}
    return {
        "accuracy": kinds["student"].quality,
        "teacher_accuracy": kinds["teacher"].quality,
        "kept": [kinds["student"].kept.value, kinds["student"].kept.low, kinds["student"].kept.high],
        "parameters": {kind: row.parameters for kind, row in kinds.items()},
        "p50": {kind: {str(entry.samples): entry.p50 for entry in row.latency} for kind, row in kinds.items()},
    }


def summarize(name: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """Return a line for each kind of student: means over seeds, and paired differences to new students, in points."""
    tested = [row for row in rows if row["split"] == "test"]
    values = {
        variant: {row["seed"]: 100 * row["accuracy"] for row in tested if row["variant"] == variant}
        for variant in VARIANTS
    }
    lines = []
    for variant, own in values.items():
        if not own:
            continue
        mine = [row for row in tested if row["variant"] == variant]
        difference = interval = ""
        if variant != "new":
            found = compare(name, variant, "new", own, values["new"])
            difference = f"{found.mean:+.2f} ± {found.std:.2f}"
            interval = f"{found.interval[0]:+.2f} to {found.interval[1]:+.2f}"
        cells = (
            name,
            variant,
            len(own),
            f"{mine[0]['parameters']['student'] / mine[0]['parameters']['teacher']:.0%}",
            spread(list(own.values())),
            difference,
            interval,
            " - ".join(f"{100 * statistics.mean(row['kept'][end] for row in mine):.1f}" for end in (1, 2)),
            f"{statistics.median(row['p50']['student']['1'] / row['p50']['teacher']['1'] for row in mine):.0%}",
        )
        lines.append(dict(zip(COLUMNS, cells, strict=True)))
    return lines


def table() -> str:
    """Return the Markdown table of the rows that were kept."""
    lines = [line for name in PROTOCOLS for line in summarize(name, read_rows(name))]
    return format_markdown_table(lines, COLUMNS)


def run_starts() -> None:
    """Keep the accuracy of students of the digits' teacher before any training, on the test images."""
    protocol = PROTOCOLS["digits"]
    train, _, test = protocol.load()
    teacher = trained_teacher({"name": "digits"}, protocol.teacher, protocol.teacher_args, train, outputs=OUTPUTS)
    calibration = collate([train[place] for place in range(CALIBRATION)])
    rows = []
    for sizes in STARTS:
        for batch in (None, calibration) if "hidden_size" in sizes else (None,):
            student = make_student(teacher, batch=batch, report=False, **sizes)
            row = {"sizes": sizes, "calibrated": batch is not None, "accuracy": accuracy(student, test)}
            rows.append({**row, "parameters": student.num_parameters() / teacher.num_parameters()})
    (RESULTS / "starts.json").write_text(json.dumps(rows, indent=1) + "\n")


def starts_table() -> str:
    """Return the Markdown table of what `run_starts` kept."""
    path, lines = RESULTS / "starts.json", []
    for row in json.loads(path.read_text()) if path.is_file() else []:
        kept = ", ".join(f"`{name}={value}`" for name, value in row["sizes"].items())
        by = "activations" if row["calibrated"] else "weights" if "hidden_size" in row["sizes"] else "even"
        cells = (kept, by, f"{row['parameters']:.0%}", f"{100 * row['accuracy']:.1f}")
        lines.append(dict(zip(STARTS_COLUMNS, cells, strict=True)))
    return format_markdown_table(lines, STARTS_COLUMNS)


def main() -> None:
    """Run the chosen protocols and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocols", nargs="*", default=[], metavar="protocol", help=", ".join(PROTOCOLS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--tune", action="store_true", help="Try learning rates on the validation split.")
    parser.add_argument("--table-only", action="store_true", help="Run nothing, print the table of the kept rows.")
    parser.add_argument("--starts", action="store_true", help="Measure students of the digits before any training.")
    options = parser.parse_args()
    if options.starts:
        run_starts()
        print(starts_table())
        return
    unknown = sorted(set(options.protocols) - set(PROTOCOLS))
    if unknown:
        parser.error(f"unknown protocol {', '.join(unknown)}; there are {', '.join(PROTOCOLS)}")
    if not options.table_only:
        for name in options.protocols or PROTOCOLS:
            run_protocol(name, options.seeds, options.variants, options.tune)
    print(table())


if __name__ == "__main__":
    main()
