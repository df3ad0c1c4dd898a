"""Numbers of a run: entropy of the association, tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from .errors import InputError, message
from .files import write_atomically

# Rows of weights averaged in bfloat16 miss one by a few thousandths; a real mistake misses it by far more.
ROW_SUM_TOLERANCE = 1e-2
MISSING = "-"


@dataclass(frozen=True)
class ModelRow:
    """One line of a comparison of models; `dataclasses.asdict(row)` is what `format_table` takes.

    Attributes:
        name: What the model is called in the table.
        parameters: Number of parameters, >= 0.
        metric: The quality that is compared, in its own unit; None: not measured.
        seconds: Wall-clock time in seconds of whatever the table compares; None: not measured.
    """

    name: str
    parameters: int
    metric: float | None
    seconds: float | None


def validate_association(association: np.ndarray) -> np.ndarray:
    """Return association weights as a float64 array after checking that they can be weights.

    Args:
        association: (student_layer, teacher_layer), each weight in [0, 1]; anything `np.asarray` takes.

    Returns:
        (student_layer, teacher_layer), float64, a copy.

    Raises:
        InputError: When it is not two-dimensional, is empty, or holds NaN, infinities or values outside [0, 1];
            it is a ValueError.
    """
    weights = np.asarray(association, dtype=np.float64)
    finite = np.isfinite(weights)
    if weights.ndim != 2 or weights.size == 0:
        received, todo = f"shape {weights.shape}", "average weights per sample over the batch (axis 0) first"
    elif not finite.all():
        received = f"{int((~finite).sum())} NaN or infinite values"
        todo = "pass `trainer.association()` after at least one logging window of training"
    elif weights.min() < -ROW_SUM_TOLERANCE or weights.max() > 1 + ROW_SUM_TOLERANCE:
        received = f"values from {weights.min():.4g} to {weights.max():.4g}"
        todo = "apply the softmax over teacher layers if these are scores"
    else:
        # Rounding may leave a weight a little outside; clip also makes the copy.
        return weights.clip(0.0, 1.0)
    raise InputError(
        message(
            "These are no association weights",
            received=received,
            expected="a (student_layer, teacher_layer) array of weights in [0, 1], at least 1 x 1",
            todo=todo,
        )
    )


def association_entropy(association: np.ndarray) -> np.ndarray:
    """Return the Shannon entropy of each student layer's weights over the teacher layers.

    0 means that the student layer listens to a single teacher layer, log(teacher_layer) that it listens to all
    of them alike.

    Args:
        association: (student_layer, teacher_layer), weights in [0, 1], each row summing to one.

    Returns:
        (student_layer,), float64, in nats, in [0, log(teacher_layer)].

    Raises:
        InputError: What `validate_association` refuses, or when a row misses a sum of one by more than 0.01.

    Source:
        Shannon, "A Mathematical Theory of Communication", 1948, section 6.
    """
    weights = validate_association(association)
    sums = weights.sum(axis=1)
    worst = int(np.abs(sums - 1).argmax())
    if abs(sums[worst] - 1) > ROW_SUM_TOLERANCE:
        raise InputError(
            message(
                "The association weights of a student layer are no distribution over the teacher layers",
                received=f"a sum of {sums[worst]:.4g} in row {worst}",
                expected="1",
                todo="normalise over the teacher layers (axis 1) first",
            )
        )
    # The limit of w log w at w = 0 is 0; taking log(1) there avoids the NaN of 0 * -inf.
    terms = weights * np.log(np.where(weights > 0, weights, 1.0))
    # Adding zero turns the -0.0 of a one-hot row into 0.0.
    entropy: np.ndarray = -terms.sum(axis=1) + 0.0
    return entropy


def format_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """Return a plain text table, numbers to the right and text to the left.

    Args:
        rows: One mapping a line; None, and a key that only some of the rows lack, is shown as "-".
        columns: Keys of the rows in the order of the columns, also their headings.

    Returns:
        Lines without trailing spaces, joined by newlines and without a last newline: headings, a rule, the rows.

    Raises:
        InputError: When there are no columns, or a column is in no row.
    """
    cells, numeric = _cells(rows, columns)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(values: Sequence[str]) -> str:
        padded = [
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, numeric, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])])


def format_markdown_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """Return a GitHub-flavoured Markdown table, numbers to the right and text to the left.

    Cells stay Markdown (a link stays a link); only what would break the table, a pipe, is escaped.

    Args:
        rows: One mapping a line; None, and a key that only some of the rows lack, is shown as "-".
        columns: Keys of the rows in the order of the columns, also their headings.

    Returns:
        Lines joined by newlines and without a last newline.

    Raises:
        InputError: When there are no columns, or a column is in no row.
    """
    cells, numeric = _cells(rows, columns)
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
    rule = "|" + "|".join("---:" if right else "---" for right in numeric) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cells(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> tuple[list[list[str]], list[bool]]:
    """Return the headings and rows as text, and which columns hold numbers."""
    if not columns:
        raise InputError(
            message("The table has no columns", received="[]", expected="at least one", todo="name keys of the rows")
        )
    unknown = [column for column in columns if rows and not any(column in row for row in rows)]
    if unknown:
        known = sorted({str(key) for row in rows for key in row})
        raise InputError(
            message(
                "Some columns are in no row",
                received=", ".join(unknown),
                expected=f"some of {', '.join(known)}",
                todo="check the spelling",
            )
        )
    values = [[row.get(column) for column in columns] for row in rows]
    cells = [[_cell(column) for column in columns], *([_cell(value) for value in line] for line in values)]
    numeric = []
    for index in range(len(columns)):
        known_values = [line[index] for line in values if line[index] is not None]
        numeric.append(bool(known_values) and all(_is_number(value) for value in known_values))
    return cells, numeric


def _is_number(value: object) -> bool:
    # numpy's integers and float32 are no subclasses of int and float, and bool is a subclass of int.
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _cell(value: object) -> str:
    """Return a value as one line of text."""
    if value is None:
        return MISSING
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return f"{int(value):,}"
    if isinstance(value, (float, np.floating)):
        return _decimal(float(value))
    return " ".join(str(value).split())


def _decimal(value: float) -> str:
    """Return a float with the digits that matter at its size, the same number of decimals for comparable values."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size >= 1000:
        return f"{value:,.1f}"
    if size >= 1e-3 or size == 0:
        return f"{value:.4f}"
    return f"{value:.2e}"


def write_json(path: str | os.PathLike[str], payload: object) -> Path:
    """Write a payload as JSON so that a reader finds the old file or the whole new one, never half of it.

    Args:
        path: File to write; missing parent folders are made.
        payload: Mappings, sequences, dataclasses, numpy arrays and scalars, torch tensors and JSON's own types,
            nested; NaN and infinities become null, which JSON has no word for.

    Returns:
        The path.

    Raises:
        InputError: When a value or key is of another type; the message tells its place in the payload.
        OSError: When the file cannot be written; an old file is then left as it was.
    """
    # allow_nan=False: should a NaN get past _jsonable, fail rather than write a file that strict readers refuse.
    text = json.dumps(_jsonable(payload, "payload"), indent=2, ensure_ascii=False, allow_nan=False)
    return write_atomic(path, (text + "\n").encode("utf-8"))


def write_atomic(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write bytes so that the file is there as a whole or not at all; see `files.write_atomically`.

    Args:
        path: File to write or replace; missing parent folders are made.
        content: The whole content.

    Returns:
        The path.

    Raises:
        OSError: When the file cannot be written; an old file is then left as it was, and no temporary file stays.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, [content])
    return target


def _jsonable(value: object, place: str) -> object:
    """Return a value made of JSON's types only, `place` being where it lies in the payload."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().tolist()
    elif isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_json_key(key, place): _jsonable(item, f"{place}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item, f"{place}[{index}]") for index, item in enumerate(value)]
    raise InputError(
        message(
            f"{place} has no form in JSON",
            received=type(value).__name__,
            expected="numbers, text, lists, mappings, dataclasses, arrays or tensors",
            todo="convert it first",
        )
    )


def _json_key(key: object, place: str) -> str:
    if isinstance(key, str):
        return key
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        return str(int(key))
    raise InputError(
        message(
            f"A key of {place} has no form in JSON",
            received=f"{key!r} ({type(key).__name__})",
            expected="text or an integer",
            todo="convert it first",
        )
    )


def environment() -> dict[str, object]:
    """Return what a reader needs to judge a timing or repeat a run, and nothing that tells who ran it or where.

    Returns:
        Versions under "python", "torch", "transformers", "accelerate", "hf_semckd" (None: not installed);
        "platform" (system and processor family), "cpu_count" (logical processors), "torch_threads", and
        "accelerator" (the first CUDA device's model, None without one). No host name, user or path.
    """
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": _version("transformers"),
        "accelerate": _version("accelerate"),
        "hf_semckd": _version("hf-semckd"),
        # Not platform.platform(): a kernel's release may carry a name that its owner gave it.
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
