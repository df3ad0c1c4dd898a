"""The command line, `hf-semckd` or `python -m hf_semckd.cli`: run the teacher over a dataset ahead of training."""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_from_disk
from transformers import AutoTokenizer, HfArgumentParser
from transformers.hf_argparser import HfArg

from .config import SemCKDConfig
from .errors import InputError, SemCKDError
from .training.trainer import SemCKDTrainer

CACHE_USAGE = "hf-semckd cache --teacher MODEL --student MODEL --dataset FOLDER --teacher_cache_dir FOLDER [options]"
USAGE = f"""\
usage: {CACHE_USAGE}

Runs the teacher once per sample and stores its outputs. Training with the same teacher_cache_dir, data and settings
then does not run the teacher.

List all options, including those of SemCKDConfig:  hf-semckd cache --help
Run on several processes:                           accelerate launch -m hf_semckd.cli cache ...
"""


@dataclass
class CacheArguments:
    """The options of `hf-semckd cache` beside those of `SemCKDConfig`."""

    teacher: str = HfArg(help="Name or folder of the teacher, as for from_pretrained.")
    student: str = HfArg(help="Name or folder of the student. Its layers determine which teacher features are stored.")
    dataset: str = HfArg(help="Folder of a dataset (Dataset.save_to_disk) with the columns used in training.")
    split: str = HfArg(default="train", help="The split to run over, if the folder holds several.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, by default the process's, and return the exit status: 2 for arguments that cannot work."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        if words[0] != "cache":
            raise SemCKDError(f"unknown command {words[0]!r}; expected: cache\n\n{USAGE}")
        run_cache(words[1:])
    except SemCKDError as error:
        print(f"hf-semckd: {error}", file=sys.stderr)
        return 2
    return 0


def run_cache(words: Sequence[str]) -> None:
    """Fill a teacher cache, as the words after `hf-semckd cache` say; `SemCKDError` when they do not fit together."""
    parser = HfArgumentParser(
        [CacheArguments, SemCKDConfig],
        prog="hf-semckd cache",
        usage=CACHE_USAGE,
        description="Run the teacher once per sample of a dataset and store its outputs in --teacher_cache_dir.",
    )
    with tempfile.TemporaryDirectory() as folder:
        parser.set_defaults(output_dir=folder, report_to="none")
        options, args = parser.parse_args_into_dataclasses(list(words))
        trainer = SemCKDTrainer(
            options.student,
            args,
            teacher_model=options.teacher,
            train_dataset=load_split(options.dataset, options.split),
            processing_class=load_tokenizer(options.student),
        )
        count = trainer.fill_teacher_cache()
    if args.process_index == 0:
        size = sum(path.stat().st_size for path in Path(args.teacher_cache_dir).rglob("*") if path.is_file())
        print(f"{count} samples are cached; {args.teacher_cache_dir} holds {size / 2**30:.2f} GB.")
        print(f"Train with the same data and settings and teacher_cache_dir={args.teacher_cache_dir!r}.")


def load_split(folder: str, split: str) -> Dataset:
    """Return a split of a saved dataset. Raises `InputError` when the folder holds no dataset, or not this split."""
    try:
        data = load_from_disk(folder)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(
            "The dataset could not be loaded",
            received=f"{folder!r} ({error})",
            expected="a folder that Dataset.save_to_disk wrote",
            todo="prepare the dataset as for training (tokenized, or with pixel_values) and save it with save_to_disk",
        ) from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise InputError(
                "The dataset does not have this split",
                received=f"--split {split}",
                expected=f"one of {', '.join(data)}",
                todo="pass one of these as --split",
            )
        data = data[split]
    # Images that were saved as lists come back as tensors.
    return data if "input_ids" in data.column_names else data.with_format("torch")


def load_tokenizer(source: str) -> Any:
    """Return the tokenizer saved with a model, which pads the samples, or None if there is none."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, AttributeError):
        return None


if __name__ == "__main__":
    raise SystemExit(main())
