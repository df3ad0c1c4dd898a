"""`hf-semckd cache`: run a teacher on a dataset ahead of training."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_from_disk
from transformers import AutoTokenizer, HfArgumentParser

from ..config import SemCKDConfig
from ..errors import InputError
from ..training.trainer import SemCKDTrainer


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
            "The dataset could not be loaded",
            received=f"{folder!r} ({error})",
            expected="a folder that Dataset.save_to_disk wrote",
            todo="prepare the dataset as for training (tokenized, or with pixel_values) and save it",
        ) from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise InputError(
                "The dataset has no such split",
                received=f"--split {split}",
                expected=f"one of {', '.join(data)}",
                todo="name one of these with --split",
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
