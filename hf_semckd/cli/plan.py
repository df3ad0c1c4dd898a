"""`hf-semckd plan`: what a training will take, with and without a teacher cache, from a few measured steps."""

import sys
from collections.abc import Sequence

from ..files import json_text
from ..recipes.preview import plan
from ..recipes.progress import Voice
from ..recipes.reading import RecipeParser, read_recipe
from .data import positive
from .distill import defaults, quieten

DESCRIPTION = "Estimate time and disk space, with and without a teacher cache."
EPILOG = """\
examples:
  hf-semckd plan recipe.yaml                      the training of this recipe
  hf-semckd plan recipe.yaml --samples 1000000    the same models and settings, with a million samples
  hf-semckd plan recipe.yaml --tokens 2e9         of a language model: so many tokens, in pieces of max_length
"""


def run(words: Sequence[str]) -> None:
    """Measure and calculate as the words after `hf-semckd plan` say."""
    parser = RecipeParser("hf-semckd plan", DESCRIPTION, EPILOG)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--samples", type=positive, help="training samples; default: those of the recipe's data")
    size.add_argument("--tokens", type=float, help="training tokens, in samples of max_length")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON; all else goes to stderr")
    flags = list(words)
    path = flags.pop(0) if flags and not flags[0].startswith("-") else None
    reading = read_recipe(parser, path, flags, defaults(path))
    options = reading.extra
    quieten(reading.args)
    voice = Voice(stream=sys.stderr if options.json else None)
    made = plan(reading, options.samples, options.tokens, voice)
    if options.json:
        print(json_text(made.summary))
