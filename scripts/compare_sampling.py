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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "scripts")]

import torch  # noqa: E402
from accuracy.statistics import compare  # noqa: E402
from common import accuracy, some_rows  # noqa: E402
from datasets import Dataset  # noqa: E402
from distill_text import make_bert, tokenize  # noqa: E402
from distill_vit import load_processor, make_vit  # noqa: E402
from image_data import load_digits_images, load_fashion_mnist, prepare_images  # noqa: E402
from text_data import load_movie_snippets  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_semckd import SemCKDConfig, SemCKDTrainer  # noqa: E402
from hf_semckd.publishing.environment import environment  # noqa: E402
from hf_semckd.publishing.tables import format_markdown_table  # noqa: E402

RESULTS = ROOT / "scripts" / "results" / "sampling"
FASHION = "/usr/share/datasets/fashion-mnist"
TEXT = ROOT / "data" / "text"
SEEDS = list(range(10, 20))
VARIANTS: dict[str, dict[str, Any]] = {"everything": {"max_tokens": 0, "max_grid": 0}, "default": {}}
QUIET = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
COLUMNS = ("protocol", "seeds", "everything %", "default %", "default - everything", "95 % interval")


@dataclass
class Protocol:
    """A trained teacher, how a student is made, and the data of both.

    Attributes:
        teacher: Trained on `teacher_train`.
        student: Makes an untrained student; the seed is set before.
        train: The student's samples by seed.
        test: What accuracy is measured on.
        processor: Tokenizer or image processor.
        args: How students train.
    """

    teacher: Any
    student: Callable[[], Any]
    train: Callable[[int], Dataset]
    test: Dataset
    processor: Any
    args: dict[str, Any]


def train_teacher(teacher: Any, train: Dataset, processor: Any, **args: Any) -> Any:
    """Fine-tune a teacher, always with the same seed, and return it."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(folder, seed=0, lr_scheduler_type="cosine", warmup_steps=0.05, **QUIET, **args)
        Trainer(teacher, settings, train_dataset=train, processing_class=processor).train()
    return teacher.eval()


def digits(patch: int) -> Protocol:
    """ViT on scikit-learn's digits, as in examples/distill_vit.py but for the patches: of 1 they give 65 tokens."""
    data, processor = load_digits_images(), load_processor(None, 8)
    inputs = {"pixel_values": processor}
    names = data["train"].features["label"].names
    train = prepare_images(data["train"], inputs)
    set_seed(0)
    teacher = train_teacher(
        make_vit(8, patch, 6, 96, names), train, None, num_train_epochs=20, learning_rate=1e-3,
        per_device_train_batch_size=32, weight_decay=0.05, remove_unused_columns=False,
    )  # fmt: skip
    return Protocol(
        teacher,
        lambda: make_vit(8, patch, 3, 48, names),
        lambda seed: train.shuffle(seed=seed).select(range(300)),
        prepare_images(data["test"], inputs),
        None,
        {"num_train_epochs": 80, "learning_rate": 2e-3, "per_device_train_batch_size": 32, "weight_decay": 0.05},
    )


def make_resnet(width: int, depth: int, labels: int) -> ResNetForImageClassification:
    """Return a ResNet of three stages for small gray images; the first keeps 14 x 14 cells of 28 x 28 pixels."""
    config = ResNetConfig(
        num_channels=1,
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width],
        depths=[depth] * 3,
        layer_type="basic",
        num_labels=labels,
        downsample_in_first_stage=False,
    )
    model = ResNetForImageClassification(config)
    model.resnet.embedder.pooler = torch.nn.Identity()
    return model


def fashion() -> Protocol:
    """ResNet on Fashion-MNIST: a student of 14 x 14, 7 x 7 and 4 x 4 cells, 100 labels a class."""
    data, processor = load_fashion_mnist(FASHION), load_processor(None, 28)
    processor.do_convert_rgb = False
    inputs = {"pixel_values": processor}
    processor.image_mean, processor.image_std = [0.286], [0.353]
    train = prepare_images(some_rows(data["train"], 20000), inputs, channels=1)
    set_seed(0)
    teacher = train_teacher(
        make_resnet(32, 2, 10), train, None, num_train_epochs=5, learning_rate=2e-3,
        per_device_train_batch_size=64, weight_decay=0.05, remove_unused_columns=False,
    )  # fmt: skip
    return Protocol(
        teacher,
        lambda: make_resnet(8, 1, 10),
        lambda seed: train.shuffle(seed=seed).select(range(1000)),
        prepare_images(some_rows(data["test"], 5000), inputs, channels=1),
        None,
        {"num_train_epochs": 20, "learning_rate": 4e-3, "per_device_train_batch_size": 64, "weight_decay": 0.05},
    )


def fashion_tokens() -> Protocol:
    """ViT on Fashion-MNIST in patches of 2 x 2 pixels: 197 tokens as in a full-size ViT, 100 labels a class."""
    data, processor = load_fashion_mnist(FASHION), load_processor(None, 28)
    inputs = {"pixel_values": processor}
    names = data["train"].features["label"].names
    train = prepare_images(some_rows(data["train"], 8000), inputs)
    set_seed(0)
    teacher = train_teacher(
        make_vit(28, 2, 6, 48, names), train, None, num_train_epochs=4, learning_rate=2e-3,
        per_device_train_batch_size=64, weight_decay=0.05, remove_unused_columns=False,
    )  # fmt: skip
    return Protocol(
        teacher,
        lambda: make_vit(28, 2, 3, 24, names),
        lambda seed: train.shuffle(seed=seed).select(range(1000)),
        prepare_images(some_rows(data["test"], 2000), inputs),
        None,
        {"num_train_epochs": 15, "learning_rate": 4e-3, "per_device_train_batch_size": 64, "weight_decay": 0.05},
    )


def text() -> Protocol:
    """MiniLM-L6, fine-tuned on movie snippets, to a new BERT of two layers, as in examples/distill_text.py."""
    tokenizer = AutoTokenizer.from_pretrained(TEXT / "minilm-l6")
    data = load_movie_snippets(TEXT / "movie_snippets")
    names = data["train"].features["label"].names
    train = tokenize(data["train"], tokenizer, 64)
    set_seed(0)
    teacher = AutoModelForSequenceClassification.from_pretrained(TEXT / "minilm-l6", num_labels=len(names))
    teacher = train_teacher(
        teacher, train, tokenizer, num_train_epochs=1, learning_rate=1e-4, per_device_train_batch_size=32
    )
    return Protocol(
        teacher,
        lambda: make_bert(tokenizer, 2, 128, 64, names),
        lambda seed: train.shuffle(seed=seed).select(range(2000)),
        tokenize(data["test"], tokenizer, 64),
        tokenizer,
        {
            "num_train_epochs": 8, "learning_rate": 1e-3, "per_device_train_batch_size": 32, "weight_decay": 0.01,
            "feature_weight": 10.0,
            # As when the kept rows were made; on text the default is zero now.
            "projection_init": "random",
        },
    )  # fmt: skip


PROTOCOLS: dict[str, Callable[[], Protocol]] = {
    "digits-65-tokens": lambda: digits(1),
    "fashion-197-tokens": fashion_tokens,
    "fashion-maps": fashion,
    "text": text,
}


def run(protocol: Protocol, variant: str, seed: int) -> dict[str, Any]:
    """Train one student and return its accuracy."""
    set_seed(seed)
    student = protocol.student()
    settings = {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "per_device_eval_batch_size": 256}
    settings |= {"remove_unused_columns": protocol.processor is not None}
    with tempfile.TemporaryDirectory() as folder:
        settings["teacher_cache_dir"] = folder
        trainer = SemCKDTrainer(
            student,
            SemCKDConfig(output_dir=folder, seed=seed, **QUIET, **settings, **protocol.args, **VARIANTS[variant]),
            teacher_model=copy.deepcopy(protocol.teacher),
            train_dataset=protocol.train(seed),
            eval_dataset=protocol.test,
            processing_class=protocol.processor,
            compute_metrics=accuracy,
        )
        own = trainer.feature_loss.comparison.projection_of
        if variant == "everything" and max(own) + 1 < len(trainer.student_layer_names):
            raise SystemExit("The student is so small that its layers share projections: that is no full comparison.")
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        value = trainer.evaluate()["eval_accuracy"]
    return {"variant": variant, "seed": seed, "accuracy": value, "seconds": round(seconds, 1)}


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
    protocol = PROTOCOLS[name]()
    for variant, seed in missing:
        row = {"protocol": name, **run(protocol, variant, seed), "args": protocol.args, "environment": environment()}
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
    """Run what was asked for and print the table."""
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
