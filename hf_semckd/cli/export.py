"""`hf-semckd export`: a saved model as ONNX files."""

import argparse
from collections.abc import Sequence

from ..evaluation.export import export_onnx
from ..files import json_text
from ..models.loading import load_model
from ..models.proof import example_inputs
from .data import new_folder


def run(words: Sequence[str]) -> None:
    """Export a model as the words after `hf-semckd export` say."""
    parser = argparse.ArgumentParser(
        prog="hf-semckd export",
        description="Write a model as an ONNX file for batches and texts of any length, and compare it with PyTorch.",
        epilog="example: hf-semckd export out/student onnx --int8",
    )
    parser.add_argument("model", help="Hub name or folder")
    parser.add_argument("folder", help="where model.onnx is written")
    parser.add_argument("--int8", action="store_true", help="also write model_int8.onnx, with weights in 8 bits")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    options = parser.parse_args(list(words))
    new_folder(options.folder)
    model = load_model(options.model, "model")
    batch = example_inputs(model)
    sizes = {path: path.stat().st_size for path in export_onnx(model, options.folder, batch, int8=options.int8)}
    if options.json:
        print(json_text({str(path): size for path, size in sizes.items()}))
        return
    for path, size in sizes.items():
        print(f"{path}  {size / 1e6:,.1f} MB")
