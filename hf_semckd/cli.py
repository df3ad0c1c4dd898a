"""The command line: `hf-semckd cache` runs a teacher over a dataset ahead of training."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_from_disk
from transformers import AutoTokenizer, HfArgumentParser

from .config import SemCKDConfig
from .errors import InputError, SemCKDError, message
from .trainer import SemCKDTrainer

USAGE = """\
usage: hf-semckd cache --teacher NAME --student NAME --dataset FOLDER --teacher_cache_dir FOLDER [options]

Runs the teacher once over every sample and keeps what the student will learn from. Training with the same
teacher_cache_dir, data and settings then never runs the teacher.

hf-semckd cache --help lists all options: those of the training (SemCKDConfig), and --teacher, --student, --dataset,
--split. With several processes: accelerate launch -m hf_semckd.cli cache ...
"""


@dataclass
class CacheArguments:
    """What is cached for whom.

    Attributes:
        teacher: Name or folder of the teacher.
        student: Name or folder of the student.
        dataset: Folder of a prepared dataset.
        split: Split of it.
    """

    teacher: str = field(metadata={"help": "Teacher: a name or folder for from_pretrained."})
    student: str = field(
        metadata={"help": "Student: a name or folder. Its layers decide what of the teacher's is comparable."}
    )
    dataset: str = field(
        metadata={"help": "Folder of a dataset (Dataset.save_to_disk) with the columns that the training will read."}
    )
    split: str = field(default="train", metadata={"help": "Split, where the folder holds several."})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words behind the program's name; None takes those of the process.

    Returns:
        The exit status: 0, or 2 when something was asked for that cannot be done.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if words[0] != "cache":
        print(f"hf-semckd: unknown command {words[0]!r}; expected: cache\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        cache(words[1:])
    except SemCKDError as error:
        print(f"hf-semckd: {error}", file=sys.stderr)
        return 2
    return 0


def cache(words: Sequence[str]) -> None:
    """Fill the teacher cache that the words describe.

    Raises:
        SemCKDError: When they cannot work together.
    """
    parser = HfArgumentParser([CacheArguments, SemCKDConfig], prog="hf-semckd cache")
    with tempfile.TemporaryDirectory() as folder:
        parser.set_defaults(output_dir=folder, report_to="none")
        options, args = parser.parse_args_into_dataclasses(list(words))
        data = load_split(options.dataset, options.split)
        trainer = SemCKDTrainer(
            options.student,
            args,
            teacher_model=options.teacher,
            train_dataset=data,
            processing_class=load_tokenizer(options.student),
        )
        count = trainer.fill_teacher_cache()
    if args.process_index == 0:
        size = sum(path.stat().st_size for path in Path(args.teacher_cache_dir).rglob("*.safetensors"))
        print(f"{count} samples are cached; {args.teacher_cache_dir} holds {size / 2**30:.2f} GB.")
        print(f"Train with the same data and settings and teacher_cache_dir={args.teacher_cache_dir!r}.")


def load_split(folder: str, split: str) -> Dataset:
    """Return a split of a saved dataset.

    Raises:
        InputError: When there is none.
    """
    try:
        data = load_from_disk(folder)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(
            message(
                "The dataset could not be loaded",
                received=f"{folder!r} ({error})",
                expected="a folder that Dataset.save_to_disk wrote",
                todo="prepare the dataset as for training (tokenized, or with pixel_values) and save it",
            )
        ) from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise InputError(
                message(
                    "The dataset has no such split",
                    received=f"--split {split}",
                    expected=f"one of {', '.join(data)}",
                    todo="name one of these with --split",
                )
            )
        data = data[split]
    # Images that were saved as lists come back as tensors.
    return data if "input_ids" in data.column_names else data.with_format("torch")


def load_tokenizer(source: str) -> Any:
    """Return the tokenizer beside a model, which pads its samples, or None for models without one."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, AttributeError):
        return None


if __name__ == "__main__":
    raise SystemExit(main())
