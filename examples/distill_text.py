"""Distill a pretrained BERT into a much smaller one, and compare with the student alone and with plain KD.

    python scripts/fetch_text_parts.py                  # once: a pretrained teacher and labeled movie snippets
    accelerate launch examples/distill_text.py
    python examples/distill_text.py --dataset_name stanfordnlp/imdb --teacher_name_or_path bert-base-uncased \
        --max_length 256

Writes into output_dir: student and cut_student (plain models with their tokenizer; the second started from the
teacher), the other models, report.json, association.png.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from comparison import Arguments, Comparison, load_labeled, load_or_make, parse_arguments, small_config
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig
from transformers.hf_argparser import HfArg

from hf_semckd import make_student

DEFAULTS = {
    "output_dir": "outputs/text",
    "num_train_epochs": 8.0,
    "learning_rate": 1e-3,
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "per_device_eval_batch_size": 128,
}


@dataclass
class TextArguments(Arguments):
    text_dir: str = HfArg(default="data/text", help="Where scripts/fetch_text_parts.py put teacher and snippets.")
    dataset_name: str | None = HfArg(default=None, help="Hub dataset or folder of one. None: the movie snippets.")
    train_file: str | None = HfArg(default=None, help="Instead: a csv file to train on.")
    test_file: str | None = HfArg(default=None, help="csv file to evaluate on. None: a part of train_file.")
    text_column: str = HfArg(default="text", help="Column of the texts.")
    label_column: str = HfArg(default="label", help="Column of the classes.")
    max_length: int = HfArg(default=64, help="Tokens of a text that are used.")
    student_depth: int = HfArg(default=2, help="Layers of a new student.")
    student_width: int = HfArg(default=128, help="Width of a new student, a multiple of 32.")


def load_movie_snippets(folder: Path) -> DatasetDict:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    files = {split: str(fetched(folder / f"{split}.csv")) for split in ("train", "validation", "test")}
    return load_dataset("csv", data_files=files, features=features)


def fetched(path: Path) -> Path:
    if path.exists():
        return path
    raise SystemExit(f"error: There is no {path}; `python scripts/fetch_text_parts.py` fetches it. Run that first.")


def load_texts(options: TextArguments, seed: int) -> DatasetDict:
    columns = {"text": options.text_column, "label": options.label_column}
    if options.train_file is not None:
        files = {"train": options.train_file, **({"test": options.test_file} if options.test_file else {})}
        return load_labeled("csv", None, columns, seed, data_files=files)
    if options.dataset_name is not None:
        return load_labeled(options.dataset_name, options.dataset_config, columns, seed)
    return load_movie_snippets(Path(options.text_dir) / "movie_snippets")


def tokenize(dataset: Dataset, tokenizer: Any, max_length: int, teacher_tokenizer: Any = None) -> Dataset:
    """Tokenize; with a second tokenizer also for the teacher, then padded to one length, which any collator takes."""
    padding = "do_not_pad" if teacher_tokenizer is None else "max_length"

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        make = {"text": batch["text"], "truncation": True, "max_length": max_length, "padding": padding}
        encoded = dict(tokenizer(**make))
        if teacher_tokenizer is not None:
            encoded |= {f"teacher_{name}": values for name, values in teacher_tokenizer(**make).items()}
        return {**encoded, "labels": batch["label"]}

    return dataset.map(encode, batched=True, remove_columns=dataset.column_names, desc="Tokenizing")


def main() -> None:
    options, args = parse_arguments(TextArguments, DEFAULTS)
    given = options.train_file or options.dataset_name
    comparison = Comparison(given or "movie_snippets", "sentences", options, args)
    source = options.teacher_name_or_path or str(fetched(Path(options.text_dir) / "minilm-l6"))
    teacher_tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(options.student_name_or_path or source)
    other = None if tokenizer.get_vocab() == teacher_tokenizer.get_vocab() else teacher_tokenizer
    prepare = partial(tokenize, max_length=options.max_length)
    with args.main_process_first(desc="loading the sentences"):
        data = load_texts(options, args.seed)
        train, few, test = comparison.choose_rows(data, None if given else 2000)
        teacher_data = prepare(train, teacher_tokenizer), prepare(test, teacher_tokenizer), teacher_tokenizer
        student_rows = prepare(few, tokenizer, teacher_tokenizer=other), prepare(test, tokenizer)

    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    tokens["max_position_embeddings"] = options.max_length
    names = train.features["label"].names
    new = small_config(BertConfig, names, 32, options.student_depth, options.student_width, **tokens)
    load = partial(load_or_make, AutoModelForSequenceClassification, args.seed)
    teacher, trained = load(source, new)
    student, _ = load(options.student_name_or_path, new)

    comparison.run_teacher(teacher, *teacher_data, epochs=0.0 if trained else 1.0, learning_rate=1e-4)

    student_data = *student_rows, tokenizer, teacher
    # The teacher is much larger than the students, and the sentences do not vary: keep what it says of each.
    with tempfile.TemporaryDirectory() as cache:
        args.teacher_cache_dir = args.teacher_cache_dir or cache
        both = prepare(test, tokenizer, teacher_tokenizer=other)
        comparison.run_students("new", student, both, *student_data)
        # It reads what its teacher reads, and needs fewer and smaller steps than a new one.
        cut = make_student(teacher, num_layers=options.student_depth, report=False)
        cut_data = prepare(few, teacher_tokenizer), *teacher_data[1:], teacher
        fields = {"num_train_epochs": 3.0, "learning_rate": 3e-4}
        comparison.run_students("cut", cut, teacher_data[1], *cut_data, **fields)
    comparison.report()


if __name__ == "__main__":
    main()
