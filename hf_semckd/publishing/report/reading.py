"""JSON that nobody has checked, as typed data: what does not fit is refused with its place."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from ...errors import InputError

# Larger counts overflow floats and formats, and nothing here has them.
LARGEST = 2**63


def load_json(path: Path) -> Any:
    """Return the content of a JSON file; `InputError` where it holds something else."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise InputError(
            "This file cannot be read",
            received=f"{path.name} ({error})",
            expected="JSON in UTF-8",
            todo="write it again, or delete it",
        ) from error


def read(kind: Any, value: Any, place: str) -> Any:
    """Return JSON as a dataclass, or as a field of one; `InputError` names the place that does not fit.

    Keys that the dataclass does not have are ignored. A null is NaN where a float is expected: JSON has none.
    """
    return _read(kind, value, place)


def _read(kind: Any, value: Any, place: str) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [entry for entry in get_args(kind) if entry is not type(None)]
        return None if value is None else _read(kinds[0], value, place)
    if dataclasses.is_dataclass(kind):
        return _read_object(kind, value, place)
    return _readers(get_origin(kind) or kind)(kind, value, place)


def _readers(kind: Any) -> Callable[[Any, Any, str], Any]:
    return {tuple: _read_list, Mapping: _read_mapping, float: _read_float, int: _read_count}.get(kind, _read_plain)


def _read_object(kind: Any, value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise _unfit(place, value, "an object")
    hints, found = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if field.name in value:
            found[field.name] = _read(hints[field.name], value[field.name], f"{place}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise _unfit(f"{place}.{field.name}", None, "a value")
    return kind(**found)


def _read_list(kind: Any, value: Any, place: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _unfit(place, value, "a list")
    return tuple(_read(get_args(kind)[0], item, f"{place}[{index}]") for index, item in enumerate(value))


def _read_mapping(kind: Any, value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _unfit(place, value, "an object")
    return {key: _read(get_args(kind)[1], item, f"{place}.{key}") for key, item in value.items()}


def _read_float(kind: Any, value: Any, place: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < LARGEST:
        raise _unfit(place, value, "a number")
    return float(value)


def _read_count(kind: Any, value: Any, place: str) -> int:
    if type(value) is not int or not 0 <= value < LARGEST:
        raise _unfit(place, value, "a count")
    return value


def _read_plain(kind: Any, value: Any, place: str) -> Any:
    if kind is not Any and type(value) is not kind:
        raise _unfit(place, value, {str: "a text", bool: "true or false"}.get(kind, kind.__name__))
    # Half a surrogate pair cannot be written again.
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _unfit(place: str, value: Any, expected: str) -> InputError:
    return InputError(
        f"{place[:200]} does not fit",
        received=f"{type(value).__name__} {str(value)[:80]!r}",
        expected=expected,
        todo="do not edit the file by hand: write it again with the version of hf_semckd that reads it",
    )
