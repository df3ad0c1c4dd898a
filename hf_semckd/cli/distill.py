"""`hf-semckd distill`: from a recipe to a student, its deploy table and its report."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch

from ..errors import SourceError
from ..files import json_text
from ..recipes.folder import RunFolder
from ..recipes.preview import preview
from ..recipes.progress import Voice
from ..recipes.reading import RecipeParser, read_recipe
from ..recipes.run import Outcome, run_recipe

EPILOG = """\
examples:
  hf-semckd distill recipe.yaml                      what the file says
  hf-semckd distill recipe.yaml --learning_rate 1e-4 the same, with another value
  hf-semckd distill recipe.yaml --dry-run            what will be done, and how long it will take
  hf-semckd distill --teacher textattack/bert-base-uncased-SST-2 --num_layers 4 \\
                    --dataset stanfordnlp/sst2 --output_dir outputs/sst2
  accelerate launch -m hf_semckd distill recipe.yaml several processes

Run again, it goes on where it stopped. Recipes to start from: examples/recipes.
"""


def run(words: Sequence[str]) -> int:
    """Distill as the words after `hf-semckd distill` say; 1 means that the student is trained but something failed."""
    parser = RecipeParser("hf-semckd distill", "Distill a teacher into a smaller student.", EPILOG)
    parser.add_argument("--dry-run", action="store_true", help="tell what will be done, and train a few steps only")
    parser.add_argument("--json", action="store_true", help="print the results as JSON; all else goes to stderr")
    flags = list(words)
    path = flags.pop(0) if flags and not flags[0].startswith("-") else None
    reading = read_recipe(parser, path, flags, defaults(path))
    args, for_machines = reading.args, reading.extra.json
    voice = Voice(args.process_index == 0, sys.stderr if for_machines else None)
    quieten(args)
    try:
        if reading.extra.dry_run:
            made = preview(reading, voice)
            if for_machines:
                print(json_text(made.summary))
            return 0
        outcome = run_recipe(reading, voice)
    except SourceError as error:
        # The comments at the top of a recipe tell where to get what it needs.
        said = f"\n\n{path} says:\n{reading.recipe.head}" if reading.recipe.head else ""
        raise SourceError(f"{error}{said}") from error
    except (KeyboardInterrupt, SystemExit):  # the latter after a SIGTERM
        known = RunFolder(args.output_dir)
        goes_on = "goes on from the last checkpoint" if known.begun and not reading.extra.dry_run else "starts anew"
        voice.text(f"\nInterrupted. The same command {goes_on} in {args.output_dir}.")
        raise
    if args.process_index == 0:
        if for_machines:
            print(json_text(outcome))
        _tell(outcome, voice)
    return 1 if outcome.problems else 0


def defaults(path: str | None) -> dict[str, Any]:
    """Return what a recipe has where it says nothing and `TrainingArguments` would do something else."""
    return {
        "output_dir": f"outputs/{'distill' if path is None else Path(path).stem}",
        "report_to": "none",
        "logging_steps": 0.02,
        "eval_strategy": "epoch",
        "save_strategy": "steps",
        "save_steps": 0.1,
        "save_total_limit": 1,
        "warmup_steps": 0.1,
        # Bars are for terminals.
        "disable_tqdm": not sys.stderr.isatty(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def quieten(args: Any) -> None:
    """Leave a log to the lines that are printed here."""
    if args.disable_tqdm or args.process_index > 0:
        datasets.disable_progress_bars()


def _tell(outcome: Outcome, voice: Voice) -> None:
    """Say where the results are, and what to do next."""
    voice("student", f'{outcome.student}    {outcome.auto_class}.from_pretrained("{outcome.student}")')
    for path in outcome.onnx:
        voice("onnx", path)
    if outcome.report is not None:
        voice("report", outcome.report)
    voice("next", f"hf-semckd push {shlex.quote(outcome.student)}")
