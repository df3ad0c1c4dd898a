"""`hf-semckd report`: the report of a training, as a page."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..files import json_text
from ..training.saved_report import report_of_folder
from .data import new_folder

EXAMPLE = """\
example:
  hf-semckd report out

The folder is the output_dir of a training. No model is run: what its files do not tell, the page says how to get.
"""


def run(words: Sequence[str]) -> None:
    """Write the page as the words after `hf-semckd report` say, and print its address."""
    parser = argparse.ArgumentParser(
        prog="hf-semckd report",
        description="Write report.html and its data, report.json, of a training.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="output_dir of a training")
    parser.add_argument("--output", help="folder to write to (default: FOLDER)")
    parser.add_argument("--json", action="store_true", help="print the data as JSON instead of a short text")
    options = parser.parse_args(list(words))
    report = report_of_folder(options.folder)
    page = report.save(new_folder(options.folder if options.output is None else options.output))
    print(json_text(report) if options.json else f"{report}\n\n{Path(page).absolute().as_uri()}")
