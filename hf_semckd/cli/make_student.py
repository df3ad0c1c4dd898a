"""`hf-semckd make-student`: a smaller model that starts from a saved teacher."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from huggingface_hub import ModelCardData
from torch import nn

from ..errors import InputError
from ..evaluation.variants import LabeledData, usual_collator
from ..files import json_text, write_atomic
from ..models.importance import Importance
from ..models.loading import load_model
from ..models.sizes import count_parameters
from ..publishing.folder import CARD
from ..publishing.sources import Source, hub_source, source_of
from ..recipes.models import cut_student
from ..recipes.schema import BUDGETS, ModelOptions
from .data import load_processor, load_split, new_folder, positive

# What both a recipe and this command say of a student that is cut out.
CUTTING = (*BUDGETS, "importance", "init")


def run(words: Sequence[str]) -> None:
    """Make a student as the words after `hf-semckd make-student` say, and save it with the teacher's tokenizer."""
    parser = argparse.ArgumentParser(
        prog="hf-semckd make-student",
        description="Cut a smaller student out of a fine-tuned teacher, by layers, channels or a budget.",
        epilog="example: hf-semckd make-student bert-base-sst2 student --parameters 0.3",
    )
    parser.add_argument("teacher", help="Hub name or folder")
    parser.add_argument("folder", help="where the student is saved")
    parser.add_argument("--num-layers", type=int, nargs="+", help="blocks; two numbers for encoder and decoder")
    parser.add_argument("--hidden-size", type=int, help="channels")
    parser.add_argument("--parameters", type=float, help="largest share of the teacher's parameters, such as 0.3")
    parser.add_argument("--latency-ms", type=float, help="largest time for a batch of --dataset, on this machine")
    parser.add_argument(
        "--importance",
        default="even",
        choices=get_args(Importance),
        help="which blocks are kept (default: even)",
    )
    parser.add_argument(
        "--init", default="teacher", choices=("teacher", "random"), help="weights to start from (default: teacher)"
    )
    parser.add_argument("--dataset", help="folder of Dataset.save_to_disk, for --latency-ms and --importance")
    parser.add_argument("--split", default="train", help="split of the data set (default: train)")
    parser.add_argument("--batch-size", type=positive, default=1, help="samples of it that are used (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(list(words))
    _check(options)
    teacher, processor = load_model(options.teacher, "teacher"), load_processor(options.teacher)
    sizes = ModelOptions(**{name: getattr(options, name) for name in CUTTING})
    batch = None if options.dataset is None else _batch(options, teacher, processor)
    student = cut_student(teacher, sizes, batch, report=not options.json)
    student.save_pretrained(options.folder)
    if processor is not None:
        processor.save_pretrained(options.folder)
    _keep_source(options.folder, student, source_of(teacher))
    if options.json:
        print(json_text({"student": options.folder, "parameters": count_parameters(student)}))
        return
    print(f"\nSaved in {options.folder}. Train it: SemCKDTrainer(model={options.folder!r}, teacher_model=...)")


def _keep_source(folder: str, student: nn.Module, teacher: Source) -> None:
    """Write a card with what the student starts from, which its configuration does not keep."""
    base = hub_source(student)
    if base is not None:
        data = ModelCardData(base_model=base, license=teacher.license)
        write_atomic(Path(folder, CARD), f"---\n{data.to_yaml()}\n---\n\nCut out of {base}, not trained.\n".encode())


def _batch(options: argparse.Namespace, teacher: nn.Module, processor: Any) -> Mapping[str, Any]:
    data = load_split(options.dataset, options.split)
    return LabeledData(data, usual_collator(processor), (teacher,)).first(options.batch_size)


def _check(options: argparse.Namespace) -> None:
    """Refuse to write over a model, and sizes that need samples where there are none."""
    folder = Path(new_folder(options.folder, options.teacher))
    if (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        raise InputError(
            "There is a model in this folder already",
            received=str(folder),
            expected="a new folder",
            todo="choose another folder, or remove this one",
        )
    if options.dataset is None and (options.latency_ms is not None or options.importance != "even"):
        raise InputError(
            "Time and importance are measured on samples",
            received="--latency-ms" if options.latency_ms is not None else f"--importance {options.importance}",
            expected="prepared data",
            todo="name them with --dataset, and their number with --batch-size",
        )
