"""Models as ONNX files, for batches and texts of any length, checked against PyTorch; and with weights in 8 bits."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError, MissingDependencyError
from ..models.inputs import inference_inputs, run_on_inputs
from ..models.loading import ModelSource, load_model
from ..models.outputs import logits_of, returns_spans
from ..teacher.placement import is_whole

NEEDED = ("onnx", "onnxruntime", "onnxscript")
# Of the largest logit; kernels of PyTorch and ONNX Runtime add in another order.
TOLERANCE = 1e-3
FLOAT_FILE, INT8_FILE = "model.onnx", "model_int8.onnx"
# Operators of a package that no model here needs: https://github.com/pytorch/pytorch/pull/141569.
EXPORTER_LOG, MISSING_OPERATORS = "torch.onnx._internal.exporter._registration", "torchvision is not installed"
NOISE = (
    # Of torch, by torch: https://github.com/pytorch/pytorch/pull/167470.
    "`isinstance(treespec, LeafSpec)` is deprecated",
    # Equal axes of two inputs were given one name: https://github.com/pytorch/pytorch/pull/146321.
    "# The axis name: ",
)


def export_onnx(
    model: ModelSource, folder: str | os.PathLike[str], batch: Mapping[str, Any], *, int8: bool = False
) -> list[Path]:
    """Write `model.onnx`, which gives a model's logits, and with `int8` also `model_int8.onnx`; return their paths.

    Batches may have any number of samples and texts any length. The outputs of ONNX Runtime are compared with
    PyTorch's, for `batch` and for its first sample without a token. With int8, weights of embeddings and matrix
    products have 8 bits and activations are quantized as they come; convolutions stay in float32.

    Args:
        model: A model, a name or a folder; it stays as it is.
        batch: Inputs of the kind that the model will get.

    Raises `MissingDependencyError` without onnx, onnxscript and onnxruntime; `InputError` for a model that cannot be
    exported, or whose file says something else.
    """
    check_installed()
    source = load_model(model, "model")
    _check_whole(source)
    # The fused attention of PyTorch has no form in ONNX for every layout; ONNX Runtime fuses the plain one by itself.
    plain: Any = copy.deepcopy(source).cpu().float().eval()
    if hasattr(plain, "set_attn_implementation"):
        plain.set_attn_implementation("eager")
    tensors = {name: value.cpu() for name, value in batch.items() if isinstance(value, Tensor)}
    inputs = inference_inputs(plain, tensors)
    written = Path(folder)
    written.mkdir(parents=True, exist_ok=True)
    # Beside the target, and moved there when all is right; weights of over 1.5 GB have a file of their own.
    with tempfile.TemporaryDirectory(dir=written) as beside:
        path = Path(beside) / FLOAT_FILE
        _write(plain, inputs, path)
        _check(plain, inputs, path)
        if int8:
            _quantize(path, Path(beside) / INT8_FILE)
        for name in (FLOAT_FILE, INT8_FILE):  # of another model, perhaps
            (written / name).unlink(missing_ok=True)
            (written / f"{name}.data").unlink(missing_ok=True)
        for made in Path(beside).iterdir():
            made.replace(written / made.name)
    return [written / name for name in (FLOAT_FILE, INT8_FILE)[: 1 + int8]]


def check_installed() -> None:
    """Raise `MissingDependencyError` where what writes or runs ONNX files is missing."""
    missing = [name for name in NEEDED if not is_installed(name)]
    if missing:
        raise MissingDependencyError(
            "ONNX files need packages that are not installed",
            received=f"an environment without {', '.join(missing)}",
            expected=", ".join(NEEDED),
            todo='pip install "hf-semckd[onnx]"',
        )


def is_installed(name: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(name) is not None


def open_session(path: Path) -> Any:
    """Return an ONNX Runtime session on the CPU, with the number of threads that PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _check_whole(model: nn.Module) -> None:
    if not is_whole(model):
        raise InputError(
            f"{type(model).__name__} cannot be written as an ONNX file while its weights are not together",
            received="a model that is dispatched, offloaded or sharded",
            expected="a model on one device",
            todo="pass its name or folder, or load it anew",
        )


class _Logits(nn.Module):
    """A model that takes its inputs by place and returns its logits; those of a span as start and end."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(**dict(zip(self.names, values, strict=True)))
        if returns_spans(outputs):
            return outputs.start_logits, outputs.end_logits
        return (logits_of(outputs, "model"),)


def _write(model: nn.Module, inputs: Mapping[str, Tensor], path: Path) -> None:
    wrapped = _Logits(model, list(inputs)).eval()
    # One sample would be taken for the only number of samples there is.
    values = tuple(torch.cat([value, value]) if len(value) == 1 else value for value in inputs.values())
    with torch.no_grad():
        count = len(run_on_inputs("model", inputs, lambda: wrapped(*values)))
    names: Any = {
        "input_names": list(inputs),
        "output_names": ["start_logits", "end_logits"] if count == 2 else ["logits"],
    }
    # The second axis of a matrix may also be that of features, whose number is fixed.
    for lengths in (True, False):
        dynamic = tuple(_dynamic(name, value, lengths) for name, value in inputs.items())
        try:
            with _without_noise():
                program: Any = torch.onnx.export(
                    wrapped, values, dynamo=True, dynamic_shapes=(dynamic,), verbose=False, **names
                )
                program.save(str(path))
            return
        except Exception as error:  # the exporter has errors of its own for every stage
            last = error
    raise InputError(
        f"{type(model).__name__} cannot be written as an ONNX file",
        received=f"{type(last).__name__}: {str(last.__cause__ or last).strip().splitlines()[0]}",
        expected="a model whose forward torch.export can follow",
        todo="deploy it with PyTorch, or try a newer torch",
    ) from last


def _dynamic(name: str, value: Tensor, lengths: bool) -> dict[int, str]:
    """Return which axes of an input may have any length: samples, and tokens or frames of sound."""
    sequence = {1: "decoder_sequence" if name.startswith("decoder_") else "sequence"}
    return {0: "batch", **(sequence if lengths and value.dim() == 2 else {})}


@torch.no_grad()
def _check(model: nn.Module, inputs: Mapping[str, Tensor], path: Path) -> None:
    """Compare what the file and the model say, for all the inputs, and for the first sample without a token."""
    session, wrapped = open_session(path), _Logits(model, list(inputs))
    for tried in (inputs, _shorter(wrapped, inputs)):
        expected = [value.numpy() for value in wrapped(*tried.values())]
        taken = {entry.name: tried[entry.name].numpy() for entry in session.get_inputs()}
        try:
            found = session.run(None, taken)
        except Exception as error:  # of ONNX Runtime, which has no base class of its own
            raise _differs(model, tried, str(error)) from error
        for own, theirs in zip(found, expected, strict=True):
            gap = float(np.abs(own - theirs).max()) if own.shape == theirs.shape else np.inf
            if not gap <= TOLERANCE * max(float(np.abs(theirs).max()), 1.0):
                raise _differs(model, tried, f"logits that differ by {gap:.2g}")


def _shorter(model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return one sample of another length, where the model takes it; some need a token at the end of a text."""
    if all(value.dim() == 2 and not value.is_floating_point() for value in inputs.values()):
        for kept in (slice(None, -1), slice(1, None)):
            part = {name: value[:1, kept] for name, value in inputs.items()}
            with contextlib.suppress(Exception):  # whatever a model says of an incomplete text
                model(*part.values())
                return part
    return {name: value[:1] for name, value in inputs.items()}


def _differs(model: nn.Module, inputs: Mapping[str, Tensor], what: str) -> InputError:
    shapes = {name: tuple(value.shape) for name, value in inputs.items()}
    return InputError(
        f"The ONNX file of {type(model).__name__} does not do what the model does",
        received=f"for {shapes}: {what}",
        expected="the logits of PyTorch, for any number of samples and any length",
        todo="deploy it with PyTorch, or export it by hand for inputs of one size",
    )


def _quantize(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / source.name
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_dynamic(
            str(prepared),
            str(target),
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        )


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Keep what torch's exporter says of every model from the terminal; the rest gets through."""

    def telling(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(MISSING_OPERATORS)

    log = logging.getLogger(EXPORTER_LOG)
    log.addFilter(telling)
    try:
        with warnings.catch_warnings():
            for text in NOISE:
                warnings.filterwarnings("ignore", re.escape(text))
            yield
    finally:
        log.removeFilter(telling)
