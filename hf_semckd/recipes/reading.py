"""Reads a recipe: a YAML file, flags that win over it, or flags alone."""

from __future__ import annotations

import json
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..config import SemCKDConfig, distillation_fields
from ..errors import ConfigurationError, nearest
from .schema import BUDGETS, PARTS, DataOptions, ModelOptions, Recipe, ResultOptions

# Where a file may say `student: {num_layers: 4}`.
STUDENT_KEYS = (*BUDGETS, "importance", "init", "calibration_samples")


@dataclass(frozen=True)
class Reading:
    """A recipe, the arguments of the training, the names of all options that were given, and a command's own."""

    recipe: Recipe
    args: SemCKDConfig
    given: tuple[str, ...]
    extra: Namespace


class RecipeParser(HfArgumentParser):
    """Takes the fields of a recipe and of `SemCKDConfig` as flags, the library's own in front of Trainer's.

    What it cannot take raises `ConfigurationError` with the option that was probably meant.
    """

    def __init__(self, prog: str, description: str, epilog: str):
        own = _chosen_fields("Distillation", set(distillation_fields()), "distillation (fields of SemCKDConfig)")
        rest = {entry.name for entry in fields(TrainingArguments) if entry.init}
        trainers = _chosen_fields("Training", rest, "training (fields of TrainingArguments)")
        texts = {"description": description, "epilog": epilog, "formatter_class": RawDescriptionHelpFormatter}
        super().__init__([*PARTS, own, trainers], prog=prog, usage=f"{prog} [RECIPE.yaml] [options]", **texts)
        # An abbreviation may become ambiguous with the next version.
        self.allow_abbrev = False
        self.parts = [*PARTS, own, trainers]

    def error(self, message: str) -> NoReturn:
        """Raise what `argparse` would print."""
        raise ConfigurationError(f"These options cannot be used: {message}. See {self.prog} --help")

    @property
    def options(self) -> list[str]:
        """The names of all options."""
        return [entry.name for part in self.parts for entry in fields(part) if entry.init]


def read_recipe(parser: RecipeParser, path: str | None, flags: Sequence[str], defaults: Mapping[str, Any]) -> Reading:
    """Return what a file and flags say; the latter win. `defaults` are those of arguments that Trainer has otherwise.

    Raises `ConfigurationError` for a file that cannot be read, and for an option that is not known or wrong.
    """
    head, content = ("", {}) if path is None else _read_file(path, parser.options)
    words = [word for name, value in content.items() for word in _words(name, value)]
    parser.set_defaults(**defaults)
    found, unknown = parser.parse_known_args([*words, *flags])
    for word in unknown:
        name = word.lstrip("-").partition("=")[0].replace("-", "_")
        close = nearest(name, parser.options, 1) if word.startswith("-") else []
        meant = f"; did you mean --{close[0]}?" if close else ""
        raise ConfigurationError(f"unknown option {word!r}{meant} (see {parser.prog} --help)")
    names = [word.lstrip("-").partition("=")[0].replace("-", "_") for word in flags if word.startswith("--")]
    given = tuple(dict.fromkeys([*content, *(name for name in names if name in parser.options)]))
    recipe = Recipe(_part(ModelOptions, found), _part(DataOptions, found), _part(ResultOptions, found), head)
    recipe.check()
    return Reading(recipe, _part(SemCKDConfig, found), given, found)


def check_names(where: str, content: Mapping[str, Any], options: Sequence[str], place: str = "") -> None:
    """Raise `ConfigurationError` for a name that is no option, with the one that was probably meant."""
    for name in content:
        if name not in options:
            close = nearest(str(name), options, 1)
            meant = f"; did you mean {place}{close[0]}?" if close else ""
            raise ConfigurationError(f"{where}: unknown option {place}{name}{meant} (see hf-semckd distill --help)")


def training_options() -> list[str]:
    """Return the names of the options of a training: the fields of `SemCKDConfig`."""
    return [entry.name for entry in fields(SemCKDConfig) if entry.init]


def _chosen_fields(name: str, chosen: set[str], title: str) -> Any:
    """Return a class with some of the fields of `SemCKDConfig`, for a group of options."""
    hints = get_type_hints(SemCKDConfig)
    taken = [(entry.name, hints[entry.name], entry) for entry in fields(SemCKDConfig) if entry.name in chosen]
    return make_dataclass(name, taken, namespace={"_argument_group_name": title}, kw_only=True)


def _part(kind: type, found: Namespace) -> Any:
    return kind(**{entry.name: getattr(found, entry.name) for entry in fields(kind) if entry.init})


def _read_file(path: str, options: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the comments at the top of a recipe, and its options with a student's put beside the others."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        # As texts: typed, `no` were a truth value and 3e-4 a text. Mappings go on as JSON, which has types.
        content, typed = yaml.load(text, yaml.BaseLoader), yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _unreadable(path, " ".join(str(error).split()), "a YAML file") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise _unreadable(path, f"a {type(content).__name__}", "lines of the form `name: value`")
    content = {name: typed[name] if isinstance(value, dict) else value for name, value in content.items()}
    student = content.get("student")
    if isinstance(student, dict):
        check_names(path, student, STUDENT_KEYS, "student.")
        content = {**{name: value for name, value in content.items() if name != "student"}, **student}
    check_names(path, content, options)
    head = [line.lstrip("# ").rstrip() for line in _leading_comments(text)]
    return "\n".join(head), content


def _leading_comments(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if not line.startswith("#"):
            return
        yield line


def _words(name: str, value: Any) -> list[str]:
    """Return an option of a file as flags, so that both are read alike: YAML takes 3e-4 for a text."""
    if value in (None, "", "null", "~"):
        return []
    if isinstance(value, Mapping):
        return [f"--{name}", json.dumps(value)]
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *map(str, values)] if len(values) != 1 else [f"--{name}={values[0]}"]


def _unreadable(path: str, received: str, expected: str) -> ConfigurationError:
    return ConfigurationError(
        f"The recipe {path} cannot be read",
        received=received,
        expected=expected,
        todo="start from one of examples/recipes",
    )
