"""The runs of a protocol: tune every method with the same budget, then train with fresh seeds and test."""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step_cost.conditions import machine
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from hf_semckd import DistillationTrainer, SemCKDConfig
from hf_semckd.errors import ConfigurationError
from hf_semckd.losses import FEATURE_LOSSES
from hf_semckd.losses.semckd.defaults import feature_defaults
from hf_semckd.publishing.environment import environment

from .associations import trainer_class
from .data import ROOT, Splits, collate, draw, load_splits
from .mismatch import measured_mismatch
from .models import COMMON, MAP_FAMILIES, QUIET, accuracy, make_model, teacher_rows, trained_teacher
from .planted import plant
from .protocol import Method, Protocol
from .rows import RESULTS, append_row, key_of, read_rows

CACHE = ROOT / "outputs" / "accuracy" / "cache"
# Fields of a method that a protocol may set for all of them.
SHARED = ("feature_weight", "temperature", "task_weight", "logit_weight")
SHARED_DEFAULTS = {"temperature": 4.0, "task_weight": 1.0, "logit_weight": 1.0}
# What a protocol says of its data that is not for the loader.
STUDENT_ONLY = ("name", "train", "noise")
# A method's name, what is tuned of it, the seed, the split.
Run = tuple[str, dict[str, Any], int, str]


class Bench:
    """A protocol made ready: its data in memory and its teacher trained.

    Args:
        protocol: The protocol.
        results: Folder of the rows.
        device: `cpu` or `cuda`. On a GPU the teacher runs in every step: that takes less than reading a cache.
    """

    def __init__(self, protocol: Protocol, results: Path = RESULTS, device: str = "cpu"):
        self.protocol, self.device = protocol, device
        self.path = results / f"{protocol.name}.jsonl"
        limits = {key: value for key, value in protocol.data.items() if key not in STUDENT_ONLY}
        teacher_pool = limits.pop("teacher_pool", None)
        self.splits: Splits = load_splits(protocol.data["name"], tuple(sorted(limits.items())))
        model = {key: value for key, value in protocol.teacher.items() if key not in ("training", "planted")}
        pool = self.splits.pool if teacher_pool is None else self.splits.pool.take(range(teacher_pool))
        described = {key: value for key, value in protocol.data.items() if key not in ("train", "noise", "test")}
        teacher = trained_teacher(described, model, protocol.teacher.get("training", {}), pool, device)
        self.plain_teacher = teacher
        self.teacher = plant(teacher, **protocol.teacher["planted"]) if "planted" in protocol.teacher else teacher
        self.read_rows()
        self.teacher_features: dict[tuple[str, ...], list[torch.Tensor]] = {}

    def run(self, methods: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> None:
        """Do what is not done yet: the teacher's row, the tuning, the tests.

        Args:
            methods: Names; None: all of the protocol.
            seeds: To test with; None: those of the protocol.

        Raises:
            ConfigurationError: When a seed to test with has tuned.
        """
        seeds = self._test_seeds(seeds)
        self._teacher_row()
        for method in self._chosen(methods):
            chosen = self.tune(method)
            for seed in seeds:
                self.train(method, chosen, seed, "test")

    def missing(self, methods: Sequence[str] | None, seeds: Sequence[int] | None, split: str) -> list[Run]:
        """Return what `run` would train, each once; those that test are known when all that tune are there.

        Args:
            methods: See `run`.
            seeds: See `run`.
            split: `tuning` or `test`.
        """
        tests = self._test_seeds(seeds)
        found: dict[tuple[str, int], Run] = {}
        for method in self._chosen(methods):
            if split == "test":
                wanted = [(self.tune(method), seed) for seed in tests]
            else:
                candidates = method.candidates() if self._tunes(method) else []
                wanted = [(tuned, seed) for tuned in candidates for seed in self.protocol.tuning_seeds]
            for tuned, seed in wanted:
                recipe = self._recipe(method, tuned)
                known = self.record.find(method.name, tuned, recipe, seed, split) is not None
                if not known and self.record.twin(recipe, seed, split) is None:
                    found.setdefault((self.record.digest(recipe), seed), (method.name, tuned, seed, split))
        return list(found.values())

    def read_rows(self) -> None:
        """Read the rows that are there; other processes may have written some."""
        self.record = _Record(self.protocol, self.path, self.device)

    def tune(self, method: Method) -> dict[str, Any]:
        """Return the candidate with the best mean accuracy on the validation split over the tuning seeds, or {}."""
        if not self.protocol.tune:
            return {}
        candidates = method.candidates()
        if not self._tunes(method):
            return candidates[0]
        scores = [
            statistics.mean(self.train(method, tuned, seed, "tuning") for seed in self.protocol.tuning_seeds)
            for tuned in candidates
        ]
        # Of equals the first: it is the published or default one.
        return candidates[scores.index(max(scores))]

    def train(self, method: Method, tuned: Mapping[str, Any], seed: int, split: str) -> float:
        """Return the accuracy of one student, trained now unless its row is there."""
        settings = {**method.arguments, **tuned}
        recipe = self._recipe(method, tuned)
        known = self.record.find(method.name, tuned, recipe, seed, split)
        if known is not None:
            return known
        twin = self.record.twin(recipe, seed, split)
        if twin is None:
            started = time.perf_counter()
            student, trainer = self._student(method, settings, seed)
            seconds = time.perf_counter() - started
            mismatch = measured_mismatch(trainer, self.splits.validation, self.teacher_features)
            extras = _extras(trainer) if mismatch is None else {**_extras(trainer), "mismatch": round(mismatch, 5)}
            value = accuracy(student, self.splits.validation if split == "tuning" else self.splits.test)
            parameters = student.num_parameters()
        else:
            # Two methods may come down to one, such as a default and its tuned form: the run would be the same.
            value, seconds, parameters = twin["value"], twin["seconds"], twin["parameters"]
            extras = {**twin["extras"], "same_run_as": twin["method"]}
        self.record.keep(method.name, tuned, recipe, seed, split, value, seconds, parameters, extras)
        return value

    def _chosen(self, methods: Sequence[str] | None) -> list[Method]:
        return [method for method in self.protocol.methods if methods is None or method.name in methods]

    def _tunes(self, method: Method) -> bool:
        return self.protocol.tune and len(method.candidates()) > 1

    def _recipe(self, method: Method, tuned: Mapping[str, Any]) -> dict[str, Any]:
        parts = {"loss": method.loss, "association": method.association, "options": dict(method.options)}
        return {**parts, **method.arguments, **tuned}

    def _test_seeds(self, seeds: Sequence[int] | None) -> Sequence[int]:
        seeds = self.protocol.test_seeds if seeds is None else seeds
        tuned = sorted(set(seeds) & set(self.protocol.tuning_seeds))
        if tuned:
            raise ConfigurationError(
                "These seeds cannot be tested with",
                received=f"seeds {tuned}, which tune",
                expected="seeds that chose nothing",
                todo="leave them out of --seeds",
            )
        return seeds

    def _teacher_row(self) -> None:
        if self.record.find("teacher", {}, {}, 0, "test") is None:
            value = accuracy(self.plain_teacher.to(self.device), teacher_rows(self.splits.test))
            self.record.keep("teacher", {}, {}, 0, "test", value, 0.0, self.plain_teacher.num_parameters(), {})

    def _student(self, method: Method, settings: Mapping[str, Any], seed: int) -> tuple[Any, DistillationTrainer]:
        data, protocol = self.protocol.data, self.protocol
        rows = draw(self.splits.pool, data["train"], seed, data.get("noise", 0.0))
        student = make_model(protocol.student, rows, seed)
        set_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            args = {**QUIET, **COMMON, **protocol.training, **settings, "seed": seed}
            steps = _steps(len(rows), args)
            on_cpu = self.device == "cpu"
            where = {"use_cpu": on_cpu, "teacher_cache_dir": str(CACHE) if on_cpu else None}
            config = SemCKDConfig(output_dir=folder, logging_steps=max(steps // 4, 1), **where, **args)
            trainer = trainer_class(method)(
                student,
                config,
                teacher_model=self.teacher if config.distils else None,
                train_dataset=rows,
                data_collator=collate,
                feature_loss=method.loss,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return student.eval(), trainer


def _extras(trainer: DistillationTrainer) -> dict[str, Any]:
    association = trainer.association()
    extras: dict[str, Any] = {}
    if association is not None:
        extras["association"] = np.round(association, 4).tolist()
    if trainer.feature_loss is not None:
        extras["loss_parameters"] = sum(entry.numel() for entry in trainer.feature_loss.parameters())
        terms = [entry for entry in trainer.state.log_history if "feature_loss" in entry]
        extras["terms"] = {
            name: round(terms[-1][name], 5)
            for name in ("task_loss", "logit_loss", "feature_loss")
            if name in terms[-1]
        }
    return extras


def _steps(rows: int, args: Mapping[str, Any]) -> int:
    return int(args["num_train_epochs"] * -(-rows // args["per_device_train_batch_size"]))


class _Record:
    """The rows of a protocol, found by what they are of."""

    def __init__(self, protocol: Protocol, path: Path, device: str = "cpu"):
        self.protocol = protocol
        self.path = path
        self.fixed = {"data": protocol.data, "teacher": protocol.teacher, "student": protocol.student}
        self.fixed["training"] = protocol.training
        rows = read_rows(path) if path.exists() else []
        self._refuse_others(rows)
        self.rows = {key_of(row): row for row in rows}
        threads = f", {torch.get_num_threads()} thread(s)" if device == "cpu" else ""
        self.commit, self.machine = _commit(), f"{machine(device)}{threads}"

    def find(
        self, method: str, tuned: Mapping[str, Any], recipe: Mapping[str, Any], seed: int, split: str
    ) -> float | None:
        """Return the accuracy of a run that was made; refuse one of another form of the method."""
        row = self.rows.get(key_of(self._row(method, tuned, seed, split)))
        if row is not None and row["settings"]["recipe"] != self.digest(recipe):
            raise SystemExit(
                f"{self.path.name} holds rows of another form of {method}: {row['settings']['arguments']}, now "
                f"{_json(recipe)}. Give the changed method a name of its own, or delete its rows to run it anew."
            )
        return None if row is None else row["value"]

    def digest(self, recipe: Mapping[str, Any]) -> str:
        """Name what a run is made of, with what the protocol gives to all of them."""
        shared = {key: value for key, value in self.protocol.training.items() if key in SHARED}
        return _digest({**shared, **recipe}, self.protocol)

    def twin(self, recipe: Mapping[str, Any], seed: int, split: str) -> dict[str, Any] | None:
        """Return the row of a run that differs in nothing but the method's name."""
        digest = self.digest(recipe)
        for row in self.rows.values():
            if row["seed"] == seed and row["split"] == split and row["settings"].get("recipe") == digest:
                return row
        return None

    def keep(
        self,
        method: str,
        tuned: Mapping[str, Any],
        recipe: Mapping[str, Any],
        seed: int,
        split: str,
        value: float,
        seconds: float,
        parameters: int,
        extras: Mapping[str, Any],
    ) -> None:
        """Write a row down at once."""
        row = self._row(method, tuned, seed, split)
        row["settings"] |= {"recipe": self.digest(recipe), "arguments": dict(recipe)}
        row |= {
            "value": value, "commit": self.commit, "versions": environment(), "machine": self.machine,
            "seconds": round(seconds, 2), "parameters": parameters, "extras": dict(extras),
        }  # fmt: skip
        append_row(self.path, row)
        self.rows[key_of(row)] = row
        print(
            f"{self.protocol.name:<24} {split:<6} {method:<20} {json.dumps(dict(tuned)):<26} seed {seed:<4}"
            f" {100 * value:6.2f} %  {seconds:5.1f} s",
            file=sys.stderr,
            flush=True,
        )

    def _row(self, method: str, tuned: Mapping[str, Any], seed: int, split: str) -> dict[str, Any]:
        return {
            "protocol": self.protocol.name,
            "teacher": self.protocol.teacher["name"],
            "student": self.protocol.student["name"],
            "method": method,
            "seed": seed,
            "split": split,
            "metric": "accuracy",
            "settings": {"tuned": dict(tuned), **self.fixed},
        }

    def _refuse_others(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            stale = [name for name, value in self.fixed.items() if row["settings"].get(name) != _json(value)]
            if stale:
                raise SystemExit(
                    f"{self.path.name} holds rows of another form of the protocol ({', '.join(stale)} differ). Give "
                    "the changed protocol a name of its own, or delete its rows to run it anew."
                )


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _digest(recipe: Mapping[str, Any], protocol: Protocol) -> str:
    """Name what a run is made of; 3 and 3.0 are the same, and None where that is the default, but on text."""
    plain = {
        key: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
        for key, value in recipe.items()
    }
    defaults = {"feature_weight": _own_weight(plain, protocol), **SHARED_DEFAULTS}
    return hashlib.sha256(json.dumps({**defaults, **plain}, sort_keys=True).encode()).hexdigest()[:16]


def _own_weight(recipe: Mapping[str, Any], protocol: Protocol) -> float | None:
    """Return the weight that a loss takes where none is given; None where it has no name of its own, and on text."""
    loss = recipe.get("loss")
    if loss != "semckd":
        return FEATURE_LOSSES[loss].default_weight if loss in FEATURE_LOSSES else None
    if "length" in protocol.data:
        return None
    maps = {protocol.teacher["family"], protocol.student["family"]} <= MAP_FAMILIES
    return feature_defaults(recipe.get("projector"), maps=maps, images=True).feature_weight


def _commit() -> str | None:
    """Return the commit; files beside the library do not count: the rows themselves change while they are made."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "hf_semckd") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
