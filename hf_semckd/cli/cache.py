"""`hf-semckd cache`: run the teacher over a data set ahead of training."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from ..config import SemCKDConfig
from ..files import json_text
from ..training.memory import readable
from ..training.trainer import SemCKDTrainer
from .data import load_split, load_tokenizer

USAGE = "hf-semckd cache --teacher MODEL --student MODEL --dataset FOLDER --teacher_cache_dir FOLDER [options]"


@dataclass
class CacheArguments:
    """The options of `hf-semckd cache` beside those of `SemCKDConfig`."""

    teacher: str = HfArg(help="Name or folder of the teacher, as for from_pretrained.")
    student: str = HfArg(help="Name or folder of the student. Its layers determine which teacher features are stored.")
    dataset: str = HfArg(help="Folder of a dataset (Dataset.save_to_disk) with the columns used in training.")
    split: str = HfArg(default="train", help="The split to run over, if the folder holds several.")
    json: bool = HfArg(default=False, help="Print JSON instead of sentences.")


def run(words: Sequence[str]) -> None:
    """Fill a teacher cache, as the words after `hf-semckd cache` say; `SemCKDError` when they do not fit together."""
    parser = HfArgumentParser(
        [CacheArguments, SemCKDConfig],
        prog="hf-semckd cache",
        usage=USAGE,
        description="Run the teacher once per sample of a dataset and store its outputs in --teacher_cache_dir. "
        "Training with the same folder, data and settings then does not run the teacher.",
    )
    with tempfile.TemporaryDirectory() as folder:
        parser.set_defaults(output_dir=folder, report_to="none")
        options, args, unknown = parser.parse_args_into_dataclasses(list(words), return_remaining_strings=True)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
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
        if options.json:
            print(json_text({"samples": count, "bytes": size}))
            return
        print(f"{count} samples are cached; {args.teacher_cache_dir} holds {readable(size)}.")
        print(f"Train with the same data and settings and teacher_cache_dir={args.teacher_cache_dir!r}.")
