"""Protocols and methods as they are written in YAML."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from hf_semckd.errors import ConfigurationError, nearest
from hf_semckd.recipes.reading import training_options
from hf_semckd.recipes.yaml_file import check_names

METHODS = Path(__file__).resolve().parents[1] / "protocols" / "methods.yaml"
REQUIRED = ("data", "teacher", "student", "training", "methods")
KNOWN = (*REQUIRED, "description", "tuning_seeds", "test_seeds", "sweep", "tune")
# What a protocol may give a method of its own.
CHANGEABLE = {"arguments", "grid", "options"}
# A student layer forced onto a teacher layer, both as hidden-state indices; 0 would be the embedding or stem.
PAIR = re.compile(r"pair-([1-9]\d*)-([1-9]\d*)")


@dataclass(frozen=True)
class Method:
    """One way to train a student.

    Attributes:
        name: As in rows and tables.
        loss: What `DistillationTrainer` takes as `feature_loss`.
        arguments: Fields of `SemCKDConfig`.
        grid: Values to try of one or more fields; all combinations are tried.
        association: Name of an association of `scripts/accuracy/associations.py`, or None.
        options: What the loss is to be made with besides its layers; the last one where several are joined.
    """

    name: str
    loss: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    association: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def candidates(self) -> list[dict[str, Any]]:
        """Return every combination of the grid, the first being what is published or default."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


@dataclass(frozen=True)
class Protocol:
    """A teacher, a student, data, and the methods that are compared on them; see `scripts/protocols`.

    Attributes:
        name: As in rows: the file's name, and the swept value where there is one.
        description: One sentence.
        data: `name`, `train` (rows of a student; 0: all), sizes of the splits, `noise`, what the loader takes.
        teacher: `name`, `family`, its sizes, `training`, and perhaps `planted`.
        student: `name`, `family`, its sizes.
        training: Training arguments of students.
        methods: What is compared.
        tuning_seeds: Seeds of the runs that hyper-parameters are chosen by.
        test_seeds: Seeds of the runs that are reported; none of them tunes.
        tune: Whether grids are tried; without, methods run as the library has them and `training` says.
    """

    name: str
    description: str
    data: Mapping[str, Any]
    teacher: Mapping[str, Any]
    student: Mapping[str, Any]
    training: Mapping[str, Any]
    methods: Sequence[Method]
    tuning_seeds: Sequence[int]
    test_seeds: Sequence[int]
    tune: bool = True


def read_protocols(path: str | Path) -> list[Protocol]:
    """Read a protocol file; one with a `sweep` gives a protocol for each of its values.

    Raises:
        ConfigurationError: When something is missing, unknown or contradictory.
    """
    path = Path(path)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    missing = [key for key in REQUIRED if key not in (content or {})]
    unknown = [key for key in content or {} if key not in KNOWN]
    if missing or unknown:
        raise _refusal(path, f"missing {missing}, unknown {unknown}", f"the keys {', '.join(KNOWN)}")
    return [_protocol(path, name, entry) for name, entry in _swept(path.stem, content)]


def read_methods(entries: Sequence[str | Mapping[str, Any]], path: Path = METHODS) -> list[Method]:
    """Return methods by name from the file that describes them, and `pair-<s>-<t>`: layer s forced onto layer t.

    Args:
        entries: Names, or `{name: {...}}` with what is another for this protocol, such as its grid.
        path: The file of the methods.

    Raises:
        ConfigurationError: For an unknown name, or a method that is given in another form.
    """
    known = yaml.safe_load(path.read_text(encoding="utf-8"))
    changes: dict[str, Mapping[str, Any]] = {}
    for entry in entries:
        given = {entry: {}} if isinstance(entry, str) else entry
        fits = isinstance(given, Mapping) and len(given) == 1
        if not fits or not all(isinstance(change, Mapping) and set(change) <= CHANGEABLE for change in given.values()):
            raise _refusal(path, f"method {entry!r}", f"a name, or one name with its {', '.join(sorted(CHANGEABLE))}")
        changes |= given
    options = training_options()
    for method, change in {**known, **changes}.items():
        check_names(f"{path.name}, {method}", (change or {}).get("arguments") or {}, options)
    for name in changes:
        if name not in known and not PAIR.fullmatch(name):
            close = nearest(name, tuple(known), count=1)
            raise _refusal(
                path,
                f"method {name!r}",
                f"one of {', '.join(known)}, pair-<s>-<t>" + (f"; {close[0]}?" if close else ""),
            )
    return [
        Method(name=name, **{**(known[name] or {}), **change}) if name in known else replace(_pair(name), **change)
        for name, change in changes.items()
    ]


def _pair(name: str) -> Method:
    student, teacher = (int(layer) for layer in PAIR.fullmatch(name).groups())  # type: ignore[union-attr]
    layers = {"student_layers": [student], "teacher_layers": [teacher]}
    return Method(name=name, loss="semckd", arguments={"association": "uniform", **layers})


def _swept(name: str, content: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    sweep = content.get("sweep")
    if sweep is None:
        yield name, dict(content)
        return
    for value in sweep["values"]:
        entry = copy.deepcopy(dict(content))
        *parents, last = sweep["key"].split(".")
        place = entry
        for parent in parents:
            place = place[parent]
        place[last] = value
        yield f"{name}@{value}", entry


def _protocol(path: Path, name: str, content: Mapping[str, Any]) -> Protocol:
    tuning, test = content.get("tuning_seeds", [100, 101]), content.get("test_seeds", list(range(10)))
    if set(tuning) & set(test):
        raise _refusal(path, f"seeds {sorted(set(tuning) & set(test))} in both", "tuning and test seeds apart")
    # Trainings are described as in recipes.
    options = training_options()
    for given in (content["training"], content["teacher"].get("training") or {}):
        check_names(path.name, given, options)
    tune = content.get("tune", True)
    if not isinstance(tune, bool):
        raise _refusal(path, f"tune: {tune!r}", "tune: true or tune: false")
    return Protocol(
        name=name,
        description=content.get("description", ""),
        data=content["data"],
        teacher=content["teacher"],
        student=content["student"],
        training=content["training"],
        methods=read_methods(content["methods"]),
        tuning_seeds=tuning,
        test_seeds=test,
        tune=tune,
    )


def _refusal(path: Path, received: str, expected: str) -> ConfigurationError:
    return ConfigurationError(
        f"{path.name} cannot be run", received=received, expected=expected, todo="correct the file"
    )
