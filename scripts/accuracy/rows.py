"""The kept runs: one JSON object a line in scripts/results/accuracy/<protocol>.jsonl, one line a run."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from hf_semckd.errors import InputError

try:
    import fcntl
except ImportError:  # Windows has none; runs that write to one file at the same time are then on their own.
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parents[2]
# Where the kept rows lie, and what can be made again: trained teachers and their cached outputs.
RESULTS, OUTPUTS = ROOT / "scripts" / "results" / "accuracy", ROOT / "outputs" / "accuracy"
Row = dict[str, Any]
Key = tuple[str, str, int, str, str]

# The methods that do not distill: the teacher itself, whose seed is its own, and the student trained alone.
TEACHER, STUDENT = "teacher", "student"
SPLITS = ("tuning", "test")
METRICS = ("accuracy",)
# What a row holds, and of which type. `float` takes integers too, and nothing takes a bool for a number.
KEYS: dict[str, tuple[type, ...]] = {
    "protocol": (str,),
    "teacher": (str,),
    "student": (str,),
    "method": (str,),
    "seed": (int,),
    "split": (str,),
    "metric": (str,),
    "value": (float, int),
    "settings": (dict,),
    "commit": (str, type(None)),
    "versions": (dict,),
    "machine": (str,),
    "seconds": (float, int),
    "parameters": (int,),
    "extras": (dict,),
}


def validate_row(row: Mapping[str, Any]) -> None:
    """Check that a row has every key and no other, with values that can be.

    Args:
        row: `settings["tuned"]` holds what was tried (split "tuning") or chosen ("test"), {} where nothing is;
            `value` in [0, 1]; `seconds` of wall-clock time; `parameters` of what was trained; `commit` None outside
            a checkout.

    Raises:
        InputError: It names the first key that is missing, unknown or wrong; it is a ValueError.
    """
    missing, unknown = [key for key in KEYS if key not in row], [key for key in row if key not in KEYS]
    if missing or unknown:
        raise _refusal("keys", f"missing {missing}, unknown {unknown}", ", ".join(KEYS))
    for key, types in KEYS.items():
        if not isinstance(row[key], types) or isinstance(row[key], bool):
            names = " or ".join(entry.__name__ for entry in types)
            raise _refusal(key, f"{row[key]!r} ({type(row[key]).__name__})", names)
    for key, choices in (("split", SPLITS), ("metric", METRICS)):
        if row[key] not in choices:
            raise _refusal(key, repr(row[key]), " or ".join(choices))
    # A comparison with NaN is False, so these refuse it as well.
    if not 0 <= row["value"] <= 1:
        raise _refusal("value", row["value"], "a share in [0, 1]")
    if not 0 <= row["seconds"] < math.inf:
        raise _refusal("seconds", row["seconds"], "a finite time that is not negative")
    if row["parameters"] < 0:
        raise _refusal("parameters", row["parameters"], "a count")
    if not isinstance(row["settings"].get("tuned"), dict):
        raise _refusal("settings", row["settings"], 'a dict with a dict under "tuned", {} where nothing is tuned')


def key_of(row: Mapping[str, Any]) -> Key:
    """Return what tells a run from every other: protocol, method, seed, split, and the tuned settings as JSON.

    The JSON does not depend on the order of the settings, nor on whether a whole number is written as 10 or 10.0.
    """
    return row["protocol"], row["method"], row["seed"], row["split"], canonical(row["settings"]["tuned"])


def canonical(settings: Mapping[str, Any]) -> str:
    """Return settings as JSON that is the same for equal settings."""
    return json.dumps(_plain(settings), sort_keys=True, separators=(",", ":"), allow_nan=False)


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Return the rows of a file, or of all .jsonl files of a folder by name; none where nothing is yet.

    Of several rows with the same key the last one stays, with a warning. The unfinished last line of a run that was
    killed while writing is left out, with a warning.

    Args:
        path: A .jsonl file or a folder of them.

    Raises:
        InputError: When another line is no row; it names file and line.
    """
    place = Path(path)
    files = sorted(place.glob("*.jsonl")) if place.is_dir() else [place] if place.exists() else []
    return _without_duplicates(row for file in files for row in _read_file(file))


def accuracies(
    rows: Iterable[Mapping[str, Any]], protocols: Sequence[str], methods: Sequence[str]
) -> dict[str, dict[str, dict[int, float]]]:
    """Return the test accuracies by protocol, method and ascending seed, in [0, 1]; {} for a method without rows.

    Args:
        rows: As `read_rows` returns them.
        protocols: The wanted protocols, in the order of the result.
        methods: The wanted methods, in the order of the result.

    Raises:
        InputError: When test rows of a method on a protocol differ in what was tuned: some are of another choice.
    """
    found: dict[str, dict[str, dict[int, float]]] = {
        protocol: {method: {} for method in methods} for protocol in protocols
    }
    tuned: dict[tuple[str, str], str] = {}
    for row in sorted(rows, key=lambda entry: entry["seed"]):
        protocol, method = row["protocol"], row["method"]
        if row["split"] != "test" or method not in found.get(protocol, {}):
            continue
        settings = canonical(row["settings"]["tuned"])
        if tuned.setdefault((protocol, method), settings) != settings:
            raise InputError(
                f"The test rows of {method} on {protocol} differ in what was tuned",
                received=f"{tuned[protocol, method]} and {settings}",
                expected="the settings that were chosen, in all of them",
                todo="remove the rows of the other choice",
            )
        found[protocol][method][row["seed"]] = row["value"]
    return found


def append_row(path: str | os.PathLike[str], row: Mapping[str, Any]) -> None:
    """Append a row as one line, after cutting off what a killed run may have left unfinished at the end.

    Args:
        path: The .jsonl file; it and its folders are made where they are missing.
        row: See `validate_row`.

    Raises:
        InputError: When the row is not valid, or holds NaN, infinities or what JSON has no word for; nothing is
            written then.
        OSError: When the file cannot be written.
    """
    validate_row(row)
    try:
        line = json.dumps(dict(row), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise _refusal("values", error, "JSON's own types, and finite numbers") from error
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "a+b") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        file.write(_mend_end(file, target) + line)
        file.flush()
        os.fsync(file.fileno())


def _mend_end(file: BinaryIO, path: Path) -> bytes:
    """Cut off an unfinished last line; return what must come before the next one."""
    file.seek(0)
    content = file.read()
    begin = content.rfind(b"\n") + 1
    rest = content[begin:]
    if not rest:
        return b""
    if _parse(rest) is not None:
        return b"\n"
    file.truncate(begin)
    warnings.warn(f"{path.name}: cut off an unfinished last line of {len(rest)} bytes", stacklevel=3)
    return b""


def _read_file(path: Path) -> list[Row]:
    *lines, rest = path.read_bytes().split(b"\n")
    if rest and _parse(rest) is None:
        warnings.warn(f"{path.name}: left out an unfinished last line of {len(rest)} bytes", stacklevel=4)
    elif rest:
        lines.append(rest)
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _parse(line)
        try:
            if row is None:
                raise _refusal("line", line[:80].decode(errors="replace"), "one JSON object a line")
            validate_row(row)
        except InputError as error:
            raise InputError(f"{path.name}, line {number}: {error}") from error
        found.append(row)
    return found


def _parse(line: bytes) -> Row | None:
    """Return the JSON object of a line, None where it is none; no part of an object is one itself."""
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
    except ValueError:  # of JSON or of UTF-8
        return None
    return row if isinstance(row, dict) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _without_duplicates(rows: Iterable[Row]) -> list[Row]:
    found: dict[Key, Row] = {}
    for row in rows:
        key = key_of(row)
        if key in found:
            warnings.warn(f"more than one row of {', '.join(map(str, key))}: the last one counts", stacklevel=3)
        found[key] = row
    return list(found.values())


def _plain(value: Any) -> Any:
    """Return a JSON value with whole floats as integers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refusal(key: str, received: object, expected: str) -> InputError:
    return InputError(
        f"Wrong {key} of a row", received=received, expected=expected, todo="correct the row and write again"
    )
