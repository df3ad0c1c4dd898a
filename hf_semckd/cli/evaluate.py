"""`hf-semckd evaluate`: the deploy table of saved models."""

import argparse
from collections.abc import Sequence

from ..errors import InputError
from ..evaluation.evaluate import evaluate
from ..files import json_text
from ..recipes.progress import Voice
from .data import load_processor, load_split, new_folder, positive

EXAMPLE = """\
example:
  hf-semckd evaluate teacher=bert-base-sst2 student=out/student --dataset data --split test --output report

The data set is prepared (tokenized, or with pixel_values) and labeled, as for training.
"""


def run(words: Sequence[str]) -> None:
    """Evaluate models as the words after `hf-semckd evaluate` say, and print the table."""
    parser = argparse.ArgumentParser(
        prog="hf-semckd evaluate",
        description="Compare models on labeled data: quality, size, memory, latency. The first is the reference.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL", help="name in the table, and Hub name or folder")
    parser.add_argument("--dataset", required=True, help="folder that Dataset.save_to_disk wrote")
    parser.add_argument("--split", default="test", help="split, if the folder holds several (default: test)")
    parser.add_argument("--metric", help="accuracy, f1, ...; by default the usual one of the task")
    parser.add_argument("--samples", type=positive, help="evaluate on the first ones only")
    parser.add_argument("--no-onnx", action="store_true", help="measure with PyTorch alone")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--output", help="folder for evaluation.json, .txt and .png")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(list(words))
    if options.output is not None:
        new_folder(options.output)
    models = [_named(word) for word in options.models]
    if len(dict(models)) < len(models):
        raise InputError(
            "Two models have one name",
            received=" ".join(options.models),
            expected="another name for each",
            todo="rename one of them",
        )
    data = load_split(options.dataset, options.split)
    found = evaluate(
        dict(models),
        data if options.samples is None else data.select(range(min(options.samples, len(data)))),
        processing_class=load_processor(models[-1][1]),
        metric=options.metric,
        onnx=False if options.no_onnx else None,
        memory=not options.no_memory,
    )
    print(json_text(found) if options.json else found.text(Voice().width))
    if options.output is not None:
        found.save(options.output)
        if not options.json:
            print(f"\nWritten to {options.output}")


def _named(word: str) -> tuple[str, str]:
    name, equals, source = word.partition("=")
    if not (name and equals and source):
        raise InputError(
            "A model has no name", received=word, expected="NAME=MODEL", todo=f"write student={word}, for example"
        )
    return name, source
