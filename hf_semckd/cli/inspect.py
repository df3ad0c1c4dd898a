"""`hf-semckd inspect`: the layers of two models, and how they would be compared."""

import argparse
from collections.abc import Sequence

from ..choices import layer_list
from ..errors import InputError
from ..evaluation.variants import LabeledData, usual_collator
from ..files import json_text
from ..models.loading import load_model
from ..models.proof import example_inputs
from ..training.report import inspect_models
from .data import load_processor, load_split

EXAMPLE = """\
examples:
  hf-semckd inspect prajjwal1/bert-mini textattack/bert-base-uncased-SST-2
  hf-semckd inspect out/student teacher --dataset data --split train

Without --dataset both models get random inputs of the size that they are made for.
"""


def run(words: Sequence[str]) -> None:
    """Inspect two models as the words after `hf-semckd inspect` say."""
    parser = argparse.ArgumentParser(
        prog="hf-semckd inspect",
        description="Show the layers of a student and its teachers, how they would be compared, and their logits.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("student", help="Hub name or folder")
    parser.add_argument("teacher", nargs="+", help="Hub name or folder; several are inspected together")
    parser.add_argument("--student-layers", nargs="+", metavar="LAYER", help="as in SemCKDConfig; default: all blocks")
    parser.add_argument("--teacher-layers", nargs="+", metavar="LAYER", help="likewise")
    parser.add_argument("--dataset", help="folder that Dataset.save_to_disk wrote, prepared as for training")
    parser.add_argument("--split", default="train", help="split, if the folder holds several (default: train)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(list(words))
    teachers = [load_model(source, "teacher") for source in options.teacher]
    student = load_model(options.student, "student", like=teachers[0])
    processor = load_processor(options.student)
    if options.dataset is not None:
        data = LabeledData(load_split(options.dataset, options.split), usual_collator(processor), (student, *teachers))
        batch = data.first(2)
    else:
        try:
            batch = example_inputs(student)
        except InputError as error:
            raise InputError(
                "Inputs for this student cannot be made up",
                received=type(student).__name__,
                expected="a model of text, images or sound that takes a small batch",
                todo="name prepared data with --dataset",
            ) from error
    given = {"student_layers": options.student_layers, "teacher_layers": options.teacher_layers}
    layers = {name: layer_list(name, found) for name, found in given.items()}
    found = inspect_models(
        student, teachers[0] if len(teachers) == 1 else teachers, batch, processing_class=processor, **layers
    )
    memory = None if found.memory is None else found.memory.summary
    print(json_text({**vars(found), "memory": memory}) if options.json else found)
