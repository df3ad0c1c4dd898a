"""Reads a recipe: a YAML file, flags that win over it, or flags alone."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, make_dataclass
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from ..config import SemCKDConfig, distillation_fields
from ..errors import ConfigurationError, SemCKDError, nearest
from .schema import PARTS, DataOptions, ModelOptions, Recipe, ResultOptions
from .yaml_file import PLAIN, flag_words, read_file


@dataclass(frozen=True)
class Reading:
    """A recipe, the arguments of the training, the names of all options that were given, and a command's own."""

    recipe: Recipe
    args: SemCKDConfig
    given: tuple[str, ...]
    extra: Namespace

    @property
    def options(self) -> dict[str, Any]:
        """The options that were given, by name."""
        recipe = self.recipe
        known = {**vars(recipe.models), **vars(recipe.data), **vars(recipe.results), **vars(self.args)}
        return {name: known[name] for name in self.given if name in known}


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

    @property
    def flags(self) -> list[str]:
        """All flags, without their dashes; a command's own are among them."""
        return [word.removeprefix("--") for word in self._option_string_actions if word.startswith("--")]


def read_recipe(parser: RecipeParser, path: str | None, flags: Sequence[str], defaults: Mapping[str, Any]) -> Reading:
    """Return what a file and flags say; the latter win. `defaults` are those of arguments that Trainer has otherwise.

    Raises `ConfigurationError` for a file that cannot be read, and for an option that is not known or wrong.
    """
    head, content = ("", {}) if path is None else read_file(path, parser.options)
    words = [word for name, value in content.items() for word in flag_words(name, value)]
    parser.set_defaults(**defaults)
    found, unknown = parser.parse_known_args([*words, *flags])
    for name, value in vars(found).items():
        if isinstance(value, list):
            setattr(found, name, [entry.removeprefix(PLAIN) if isinstance(entry, str) else entry for entry in value])
    _expand_home(found)
    for word in unknown:
        name = word.lstrip("-").partition("=")[0].replace("-", "_")
        close = nearest(name, parser.flags, 1) if word.startswith("-") else []
        meant = f"; did you mean --{close[0]}?" if close else ""
        raise ConfigurationError(f"unknown option {word!r}{meant} (see {parser.prog} --help)")
    names = [word.lstrip("-").partition("=")[0].replace("-", "_") for word in flags if word.startswith("--")]
    names = [name if name in parser.options else name.removeprefix("no_") for name in names]
    given = tuple(dict.fromkeys([*content, *(name for name in names if name in parser.options)]))
    recipe = Recipe(_part(ModelOptions, found), _part(DataOptions, found), _part(ResultOptions, found), head)
    recipe.check()
    args = _arguments(found)
    _check_training(args)
    return Reading(recipe, args, given, found)


def _expand_home(found: Namespace) -> None:
    """Put the home folder in place of `~`, as a shell does for words that begin with it."""
    for name in ("teacher", "student", "dataset", "eval_dataset", "output_dir"):
        value = getattr(found, name)
        if isinstance(value, str):
            setattr(found, name, os.path.expanduser(value))
        elif isinstance(value, list):
            setattr(found, name, list(map(os.path.expanduser, value)))


def _check_training(args: SemCKDConfig) -> None:
    if args.max_steps <= 0 and not args.num_train_epochs > 0:
        raise ConfigurationError(
            "The student is not trained at all",
            received=f"num_train_epochs={args.num_train_epochs:g}",
            expected="a number above 0, or max_steps",
            todo="raise num_train_epochs; `hf-semckd evaluate` compares models without training",
        )
    if args.resume_from_checkpoint:
        raise ConfigurationError(
            "A recipe resumes by itself",
            received=f"resume_from_checkpoint={args.resume_from_checkpoint}",
            expected="no such option",
            todo="run the same command again: it goes on from the newest whole checkpoint in output_dir",
        )


def training_options() -> list[str]:
    """Return the names of the options of a training: the fields of `SemCKDConfig`."""
    return [entry.name for entry in fields(SemCKDConfig) if entry.init]


def _chosen_fields(name: str, chosen: set[str], title: str) -> Any:
    """Return a class with some of the fields of `SemCKDConfig`, for a group of options."""
    taken = [(entry.name, _flag_type(hint), copy.copy(entry)) for entry, hint in _argument_fields(chosen)]
    return make_dataclass(name, taken, namespace={"_argument_group_name": title}, kw_only=True)


def _argument_fields(chosen: set[str]) -> list[tuple[Any, Any]]:
    hints = get_type_hints(SemCKDConfig)
    return [(entry, hints[entry.name]) for entry in fields(SemCKDConfig) if entry.name in chosen]


def _flag_type(hint: Any) -> Any:
    """Return the type that an argument is parsed as: a text or several are a list, and a mapping is a text."""
    kinds = {get_origin(kind) or kind for kind in get_args(hint)}
    if {str, list} <= kinds:
        return list[str] | None
    return str | None if dict in kinds else hint


def _arguments(found: Namespace) -> SemCKDConfig:
    """Return the arguments of the training, with what was parsed as another type put right."""
    known = set(vars(found))
    values = {}
    for entry, hint in _argument_fields(known):
        value, kinds = getattr(found, entry.name), {get_origin(kind) or kind for kind in get_args(hint)}
        if {str, list} <= kinds and isinstance(value, list) and len(value) == 1:
            value = value[0]
        elif dict in kinds and str not in kinds and isinstance(value, str):
            value = _mapping(entry.name, value)
        values[entry.name] = value
    try:
        return SemCKDConfig(**values)
    except SemCKDError:
        raise
    except (ValueError, TypeError, ImportError, OSError) as error:  # by `TrainingArguments`
        raise ConfigurationError(f"These options cannot be used: {' '.join(str(error).split())}") from error


def _mapping(name: str, text: str) -> Any:
    with contextlib.suppress(ValueError):
        if isinstance(found := json.loads(text), dict):
            return found
    raise ConfigurationError(
        f"{name} is no mapping", received=text, expected='JSON, such as {"rope": true}', todo="correct it"
    )


def _part(kind: type, found: Namespace) -> Any:
    return kind(**{entry.name: getattr(found, entry.name) for entry in fields(kind) if entry.init})
