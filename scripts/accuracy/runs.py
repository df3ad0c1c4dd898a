"""The runs of a protocol: tune every method with the same budget, then train with fresh seeds and test."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from hf_semckd import DistillationTrainer, SemCKDConfig
from hf_semckd.errors import ConfigurationError

from .associations import trainer_class
from .data import Splits, collate, draw, load_splits
from .mismatch import measured_mismatch
from .models import COMMON, QUIET, accuracy, make_model, teacher_rows, trained_teacher
from .planted import plant
from .protocol import Method, Protocol
from .record import Outcome, Record, Run
from .rows import OUTPUTS, RESULTS, TEACHER

# What a protocol says of its data that is not for the loader.
STUDENT_ONLY = ("name", "train", "noise")


class Bench:
    """A protocol made ready: its data in memory and its teacher trained.

    Args:
        protocol: The protocol.
        results: Folder of the rows.
        device: `cpu` or `cuda`. On a GPU the teacher runs in every step: that takes less than reading a cache.
        outputs: Folder of trained teachers and their cached outputs.
    """

    def __init__(self, protocol: Protocol, results: Path = RESULTS, device: str = "cpu", outputs: Path = OUTPUTS):
        self.protocol, self.device, self.outputs = protocol, device, outputs
        self.path = results / f"{protocol.name}.jsonl"
        limits = {key: value for key, value in protocol.data.items() if key not in STUDENT_ONLY}
        teacher_pool = limits.pop("teacher_pool", None)
        self.splits: Splits = load_splits(protocol.data["name"], tuple(sorted(limits.items())))
        model = {key: value for key, value in protocol.teacher.items() if key not in ("training", "planted")}
        pool = self.splits.pool if teacher_pool is None else self.splits.pool.take(range(teacher_pool))
        described = {key: value for key, value in protocol.data.items() if key not in ("train", "noise", "test")}
        teacher = trained_teacher(described, model, protocol.teacher.get("training", {}), pool, device, outputs)
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
        self._test_teacher()
        for method in self._chosen(methods):
            chosen = self.tune(method)
            for seed in seeds:
                self.train(Run(method, chosen, seed, "test"))

    def missing(self, methods: Sequence[str] | None, seeds: Sequence[int] | None, split: str) -> list[Run]:
        """Return what `run` would train, each once; those that test are known when all that tune are there.

        Args:
            methods: See `run`.
            seeds: See `run`.
            split: `tuning` or `test`.
        """
        seeds = self._test_seeds(seeds)
        found: dict[tuple[str, int], Run] = {}
        for method in self._chosen(methods):
            if split == "test":
                chosen = self.tune(method)
                wanted = [Run(method, chosen, seed, split) for seed in seeds]
            else:
                wanted = [run for runs in self._tuning_runs(method) for run in runs]
            for run in wanted:
                if self.record.find(run) is None and self.record.twin(run) is None:
                    found.setdefault((self.record.digest(run.recipe), run.seed), run)
        return list(found.values())

    def read_rows(self) -> None:
        """Read the rows that are there; other processes may have written some."""
        self.record = Record(self.protocol, self.path, self.device)

    def tune(self, method: Method) -> Mapping[str, Any]:
        """Return the candidate with the best mean accuracy on the validation split over the tuning seeds, or {}."""
        if not self.protocol.tune:
            return {}
        scores = [statistics.mean(map(self.train, runs)) for runs in self._tuning_runs(method)]
        # Of equals the first: it is the published or default one.
        return method.candidates()[scores.index(max(scores)) if scores else 0]

    def train(self, run: Run) -> float:
        """Return the accuracy of one student, trained now unless its row is there."""
        known = self.record.find(run)
        if known is not None:
            return known
        twin = self.record.twin(run)
        if twin is None:
            outcome = self._trained(run)
        else:
            # Two methods may come down to one, such as a default and its tuned form: the run would be the same.
            extras = {**twin["extras"], "same_run_as": twin["method"]}
            outcome = Outcome(twin["value"], twin["seconds"], twin["parameters"], extras)
        self.record.keep(run, outcome)
        return outcome.value

    def _chosen(self, methods: Sequence[str] | None) -> list[Method]:
        return [method for method in self.protocol.methods if methods is None or method.name in methods]

    def _tuning_runs(self, method: Method) -> list[list[Run]]:
        """Return the runs of each candidate, or none where there is nothing to choose."""
        candidates = method.candidates()
        if not self.protocol.tune or len(candidates) < 2:
            return []
        return [[Run(method, tuned, seed, "tuning") for seed in self.protocol.tuning_seeds] for tuned in candidates]

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

    def _test_teacher(self) -> None:
        run = Run(Method(TEACHER), {}, 0, "test")
        if self.record.find(run) is None:
            value = accuracy(self.plain_teacher.to(self.device), teacher_rows(self.splits.test))
            self.record.keep(run, Outcome(value, 0.0, self.plain_teacher.num_parameters(), {}))

    def _trained(self, run: Run) -> Outcome:
        started = time.perf_counter()
        student, trainer = self._student(run)
        seconds = time.perf_counter() - started
        mismatch = measured_mismatch(trainer, self.splits.validation, self.teacher_features)
        extras = _extras(trainer) if mismatch is None else {**_extras(trainer), "mismatch": round(mismatch, 5)}
        value = accuracy(student, self.splits.validation if run.split == "tuning" else self.splits.test)
        return Outcome(value, seconds, student.num_parameters(), extras)

    def _student(self, run: Run) -> tuple[Any, DistillationTrainer]:
        data, protocol = self.protocol.data, self.protocol
        rows = draw(self.splits.pool, data["train"], run.seed, data.get("noise", 0.0))
        student = make_model(protocol.student, rows, run.seed)
        set_seed(run.seed)
        with tempfile.TemporaryDirectory() as folder:
            args = {**QUIET, **COMMON, **protocol.training, **run.settings, "seed": run.seed}
            steps = _steps(len(rows), args)
            on_cpu = self.device == "cpu"
            where: dict[str, Any] = {
                "use_cpu": on_cpu,
                "teacher_cache_dir": str(self.outputs / "cache") if on_cpu else None,
            }
            # The rows that are kept were measured with similarities within the batch, before there was a bank.
            where["association_bank"] = 0
            config = SemCKDConfig(output_dir=folder, logging_steps=max(steps // 4, 1), **where, **args)
            trainer = trainer_class(run.method)(
                student,
                config,
                teacher_model=self.teacher if config.distills else None,
                train_dataset=rows,
                data_collator=collate,
                feature_loss=run.method.loss,
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
