"""`hf-semckd push`: a saved student to the Hub, with its processor, card, pictures and ONNX files."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..files import json_text
from ..publishing.heads import processor_class
from ..publishing.push import push_folder
from .data import load_processor


def run(words: Sequence[str]) -> None:
    """Push a folder as the words after `hf-semckd push` say, and print where it went."""
    parser = argparse.ArgumentParser(
        prog="hf-semckd push",
        description="Upload a saved student to the Hub: weights, processor, model card, pictures and ONNX files; no "
        "optimizer states, logs or checkpoints. Log in with `hf auth login` first.",
        epilog="example: hf-semckd push out --repo-id you/tiny-sentiment --private",
    )
    parser.add_argument("folder", type=Path, help="the student's, such as output_dir")
    parser.add_argument("--repo-id", help="user/name (default: as in the title of the card, or the folder's name)")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch, made if it does not exist (default: main)")
    parser.add_argument("--message", default="Upload the student", help="title of the commit")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    options = parser.parse_args(list(words))
    pushed = push_folder(
        options.folder,
        repo_id=options.repo_id,
        private=options.private,
        revision=options.revision,
        message=options.message,
        processor=processor_class(load_processor(str(options.folder))),
    )
    if options.json:
        print(json_text(pushed))
        return
    print(f"Pushed to {pushed.url}")
    for name in pushed.files:
        print(f"  {name}")
