"""Perplexity of students that learn from whole cached logits and from tokens drawn of them: paired runs, same seeds.

    python scripts/compare_cached_logits.py                  # three seeds, about a quarter of an hour on one core
    python scripts/compare_cached_logits.py --seeds 3 4      # others; runs that are there are not repeated
    python scripts/compare_cached_logits.py --table          # measures nothing

The texts are modules of Python's standard library in pieces of 64 tokens (4,096 ids), every fifth module held out. A
GPT-2 of four layers learns them first, then students of two layers from the same starts. Whole logits take 1 GB of a
temporary folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accuracy.models import QUIET
from markdown_tables import format_markdown_table, spread
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, default_data_collator, set_seed

from hf_semckd import DistillationTrainer, SemCKDConfig
from hf_semckd.publishing.facts import environment

RESULTS = Path(__file__).resolve().parent / "results" / "cached_logits.jsonl"
# What changes of the configuration; None: plain training.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "no teacher": None,
    "whole logits": {"teacher_cache_samples": 0},
    "32 draws": {},
}
VOCABULARY, LENGTH, TRAINED, TESTED = 4096, 64, 60_000, 25_000
STEPS = {"per_device_train_batch_size": 16, "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "weight_decay": 0.05}


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="%(default)s.")
    parser.add_argument("--epochs", type=int, default=6, help="Of the students; %(default)s.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="The JSON lines.")
    parser.add_argument("--table", action="store_true", help="Print the table of the stored runs.")
    options = parser.parse_args()
    if not options.table:
        run(options.seeds, options.epochs, options.output)
    print(table(options.output))


def run(seeds: list[int], epochs: int, output: Path) -> None:
    """Train the teacher and the students that are missing; every run is kept as soon as it is known."""
    done = {(row["variant"], row["seed"]) for row in read(output)}
    missing = [(variant, seed) for seed in seeds for variant in VARIANTS if (variant, seed) not in done]
    if not missing:
        return
    torch.set_num_threads(1)
    train, test = pieces()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, num_train_epochs=6, learning_rate=2e-3, use_cpu=True, **STEPS, **QUIET)
        teacher = model(layers=4, width=128, seed=100)
        Trainer(teacher, args, default_data_collator, train).train()
        taught = perplexity(teacher, test)
        for variant, seed in missing:
            row = {"variant": variant, "seed": seed, "epochs": epochs, "teacher": taught}
            row |= student(variant, seed, epochs, teacher, train, test, Path(folder))
            row |= {"environment": environment()}
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def student(
    variant: str, seed: int, epochs: int, teacher: Any, train: list[Any], test: list[Any], folder: Path
) -> dict[str, float]:
    """Train one, and return its perplexity and the bytes that its cache takes for a token."""
    learner, changes = model(layers=2, width=64, seed=seed), VARIANTS[variant]
    args = {"num_train_epochs": epochs, "learning_rate": 3e-3, "seed": seed, "use_cpu": True, **STEPS, **QUIET}
    if changes is None:
        Trainer(learner, TrainingArguments(str(folder), **args), default_data_collator, train).train()
        return {"perplexity": perplexity(learner, test)}
    cache = folder / variant.replace(" ", "-")
    config = SemCKDConfig(str(folder), feature_weight=0.0, teacher_cache_dir=str(cache), **changes, **args)
    DistillationTrainer(learner, config, default_data_collator, train, teacher_model=teacher).train()
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return {"perplexity": perplexity(learner, test), "bytes": size / (len(train) * LENGTH)}


def table(path: Path = RESULTS) -> str:
    """Return the runs as a table: means and standard deviations over seeds, and differences from whole logits."""
    found = {(row["variant"], row["seed"]): row for row in read(path)}
    lines = []
    for variant in VARIANTS:
        rows = {seed: row for (name, seed), row in found.items() if name == variant}
        pairs = [(row, found.get(("whole logits", seed))) for seed, row in rows.items()]
        apart = [row["perplexity"] - whole["perplexity"] for row, whole in pairs if whole is not None]
        stored = [row["bytes"] for row in rows.values() if "bytes" in row]
        line = {
            "student learns from": variant,
            "seeds": len(rows),
            "bytes a token": f"{stored[0]:,.0f}" if stored else None,
            "perplexity": spread([row["perplexity"] for row in rows.values()]) if rows else None,
            "difference": spread(apart, signed=True) if apart and variant != "whole logits" else None,
        }
        lines.append(line)
    return format_markdown_table(lines, list(lines[0]))


def read(path: Path) -> list[dict[str, Any]]:
    """Return the runs that were kept."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def pieces() -> tuple[list[Any], list[Any]]:
    """Return pieces of text to train and to test on, with the tokens of the ones to train on."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))
    texts = [path.read_text("utf-8", errors="replace") for path in modules]
    split = [text for place, text in enumerate(texts) if place % 5], texts[::5]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(split[0], trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet))
    counts = TRAINED // LENGTH, TESTED // LENGTH
    kept = [list(itertools.islice(_cut(tokenizer, part), count)) for part, count in zip(split, counts, strict=True)]
    return kept[0], kept[1]


def _cut(tokenizer: Tokenizer, texts: list[str]) -> Iterator[dict[str, list[int]]]:
    for text in texts:
        ids = tokenizer.encode(text).ids
        for start in range(0, len(ids) - LENGTH + 1, LENGTH):
            piece = ids[start : start + LENGTH]
            yield {"input_ids": piece, "attention_mask": [1] * LENGTH, "labels": piece}


def model(layers: int, width: int, seed: int) -> GPT2LMHeadModel:
    """Return a new GPT-2."""
    set_seed(seed)
    sizes = {"n_layer": layers, "n_embd": width, "n_head": 4, "n_positions": LENGTH, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))


@torch.no_grad()
def perplexity(model: Any, rows: list[Any]) -> float:
    """Return that of all pieces together, which have one length."""
    model.eval()
    losses = [
        model(**default_data_collator(rows[start : start + 16])).loss * len(rows[start : start + 16])
        for start in range(0, len(rows), 16)
    ]
    return math.exp(float(torch.stack(losses).sum()) / len(rows))


if __name__ == "__main__":
    main()
