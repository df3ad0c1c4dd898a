"""The rows of a protocol, found by what they are of, and refused where they are of another form of it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conditions import commit, machine

from hf_semckd.losses import FEATURE_LOSSES
from hf_semckd.losses.semckd.defaults import feature_defaults
from hf_semckd.publishing.facts import environment

from .models import MAP_FAMILIES
from .protocol import Method, Protocol
from .rows import TEACHER, Row, append_row, key_of, read_rows

# Fields of a method that a protocol may set for all of them.
SHARED = ("feature_weight", "temperature", "task_weight", "logit_weight")
SHARED_DEFAULTS = {"temperature": 4.0, "task_weight": 1.0, "logit_weight": 1.0}


@dataclass(frozen=True)
class Run:
    """One training of a student, or the test of the teacher.

    Attributes:
        method: How it is trained.
        tuned: What is tried of the method's grid, or was chosen.
        seed: Of the weights, the data and their order.
        split: What it is measured on, `tuning` (the validation split) or `test`.
    """

    method: Method
    tuned: Mapping[str, Any]
    seed: int
    split: str

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of `SemCKDConfig`, beside those of the protocol."""
        return {**self.method.arguments, **self.tuned}

    @property
    def recipe(self) -> dict[str, Any]:
        """Everything that this run has of its own but its seed; nothing for the teacher."""
        if self.method.name == TEACHER:
            return {}
        parts = {"loss": self.method.loss, "association": self.method.association}
        return {**parts, "options": dict(self.method.options), **self.settings}


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        value: Accuracy in [0, 1].
        seconds: Of training.
        parameters: Of what was trained.
        extras: For JSON, such as the association.
    """

    value: float
    seconds: float
    parameters: int
    extras: Mapping[str, Any]


class Record:
    """The rows of a protocol.

    Args:
        protocol: The protocol.
        path: The file of its rows.
        device: `cpu` or `cuda`, where new ones are made.

    Raises:
        SystemExit: When a row is of other data, models or training.
    """

    def __init__(self, protocol: Protocol, path: Path, device: str = "cpu"):
        self.protocol = protocol
        self.path = path
        self.fixed = {
            "data": protocol.data,
            "teacher": protocol.teacher,
            "student": protocol.student,
            "training": protocol.training,
        }
        rows = read_rows(path) if path.exists() else []
        self._refuse_others(rows)
        self.rows = {key_of(row): row for row in rows}
        threads = f", {torch.get_num_threads()} thread(s)" if device == "cpu" else ""
        self.commit, self.machine = commit(), f"{machine(device)}{threads}"

    def find(self, run: Run) -> float | None:
        """Return the accuracy of a run that was made; refuse one of another form of the method."""
        row = self.rows.get(key_of(self._row(run)))
        if row is not None and row["settings"]["recipe"] != self.digest(run.recipe):
            raise SystemExit(
                f"{self.path.name} holds rows of another form of {run.method.name}: {row['settings']['arguments']}, "
                f"now {_json(run.recipe)}. Give the changed method a name of its own, or delete its rows to run it "
                "anew."
            )
        return None if row is None else row["value"]

    def digest(self, recipe: Mapping[str, Any]) -> str:
        """Name what a run is made of, with what the protocol gives to all of them.

        3 and 3.0 are the same, and None where that is the default, but on text.
        """
        shared = {key: value for key, value in self.protocol.training.items() if key in SHARED}
        plain = {
            key: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
            for key, value in {**shared, **recipe}.items()
        }
        defaults = {"feature_weight": self._own_weight(plain), **SHARED_DEFAULTS}
        return hashlib.sha256(json.dumps({**defaults, **plain}, sort_keys=True).encode()).hexdigest()[:16]

    def twin(self, run: Run) -> Row | None:
        """Return the row of a run that differs in nothing but the method's name."""
        digest = self.digest(run.recipe)
        for row in self.rows.values():
            if (row["seed"], row["split"], row["settings"].get("recipe")) == (run.seed, run.split, digest):
                return row
        return None

    def keep(self, run: Run, outcome: Outcome) -> None:
        """Write a row down at once."""
        row = self._row(run)
        row["settings"] |= {"recipe": self.digest(run.recipe), "arguments": run.recipe}
        row |= {
            "value": outcome.value, "commit": self.commit, "versions": environment(), "machine": self.machine,
            "seconds": round(outcome.seconds, 2), "parameters": outcome.parameters, "extras": dict(outcome.extras),
        }  # fmt: skip
        append_row(self.path, row)
        self.rows[key_of(row)] = row
        print(
            f"{self.protocol.name:<24} {run.split:<6} {run.method.name:<20} {json.dumps(dict(run.tuned)):<26} "
            f"seed {run.seed:<4} {100 * outcome.value:6.2f} %  {outcome.seconds:5.1f} s",
            file=sys.stderr,
            flush=True,
        )

    def _own_weight(self, recipe: Mapping[str, Any]) -> float | None:
        """Return the weight that a loss takes where none is given; None for joined losses, and on text."""
        loss = recipe.get("loss")
        if loss != "semckd":
            return FEATURE_LOSSES[loss].default_weight if loss in FEATURE_LOSSES else None
        if "length" in self.protocol.data:
            return None
        maps = {self.protocol.teacher["family"], self.protocol.student["family"]} <= MAP_FAMILIES
        return feature_defaults(recipe.get("projector"), maps=maps, images=True).feature_weight

    def _row(self, run: Run) -> Row:
        return {
            "protocol": self.protocol.name,
            "teacher": self.protocol.teacher["name"],
            "student": self.protocol.student["name"],
            "method": run.method.name,
            "seed": run.seed,
            "split": run.split,
            "metric": "accuracy",
            "settings": {"tuned": dict(run.tuned), **self.fixed},
        }

    def _refuse_others(self, rows: Sequence[Row]) -> None:
        for row in rows:
            stale = [name for name, value in self.fixed.items() if row["settings"].get(name) != _json(value)]
            if stale:
                raise SystemExit(
                    f"{self.path.name} holds rows of another form of the protocol ({', '.join(stale)} differ). Give "
                    "the changed protocol a name of its own, or delete its rows to run it anew."
                )


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value))
