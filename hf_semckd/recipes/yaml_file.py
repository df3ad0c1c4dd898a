"""Reads the file of a recipe: its options as texts, which are parsed as flags are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigurationError, nearest
from .schema import BUDGETS

# Where a file may say `student: {num_layers: 4}`.
STUDENT_KEYS = (*BUDGETS, "importance", "init", "calibration_samples")
# In front of what only looks like a flag; no word of a command line can hold it.
PLAIN = "\0"


def read_file(path: str, options: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the comments at the top of a recipe, and its options with a student's put beside the others.

    Raises `ConfigurationError` for a file that cannot be read, and for a name that is none of the options.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        # As texts: typed, `no` were a truth value. Mappings go on as JSON, which has types.
        content, typed = yaml.load(text, yaml.BaseLoader), yaml.load(text, _Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _unreadable(path, " ".join(str(error).split()), "a YAML file") from error
    if not isinstance(content, dict):
        received = "nothing" if typed is None else f"a {type(typed).__name__}"
        raise _unreadable(path, received, "lines of the form `name: value`")
    if isinstance(content.get("student"), dict):
        own = content.pop("student")
        check_names(path, own, STUDENT_KEYS, "student.")
        twice = next((name for name in own if name in content), None)
        if twice is not None:
            raise _unreadable(path, f"{twice} beside student and below it", "each option once")
        content, typed = {**content, **own}, {**typed, **typed["student"]}
    check_names(path, content, options)
    head = [line.lstrip("# ").rstrip() for line in _leading_comments(text)]
    # What is null is not given.
    given = {name: value for name, value in content.items() if typed[name] is not None}
    return "\n".join(head), {name: typed[name] if isinstance(value, dict) else value for name, value in given.items()}


def flag_words(name: str, value: Any) -> list[str]:
    """Return an option of a file as flags, so that both are read alike; `PLAIN` is to be removed again."""
    if isinstance(value, Mapping):
        return [f"--{name}", json.dumps(value, default=str)]
    values = [str(entry) for entry in value] if isinstance(value, list) else [str(value)]
    if len(values) == 1:
        return [f"--{name}={values[0]}"]
    return [f"--{name}", *(f"{PLAIN}{entry}" if re.match(r"-\D", entry) else entry for entry in values)]


class _Loader(yaml.SafeLoader):
    """Reads 3e-4 as a number and a date as text, and refuses a name that is there twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)


def _leading_comments(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if not line.startswith("#"):
            return
        yield line


def check_names(path: str, content: Mapping[str, Any], options: Sequence[str], place: str = "") -> None:
    """Raise `ConfigurationError` for a name that is no option, with the one that was probably meant."""
    for name in content:
        if name not in options:
            close = nearest(str(name), options, 1)
            meant = f"; did you mean {place}{close[0]}?" if close else ""
            raise ConfigurationError(f"{path}: unknown option {place}{name}{meant} (see hf-semckd distill --help)")


def _unreadable(path: str, received: str, expected: str) -> ConfigurationError:
    return ConfigurationError(
        f"The recipe {path} cannot be read",
        received=received,
        expected=expected,
        todo="start from one of examples/recipes",
    )
