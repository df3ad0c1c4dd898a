"""The report of a training that is over, from the files that it left."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..publishing.card import EVALUATION_FILE
from ..publishing.facts import PROCESSOR_FILES
from ..publishing.folder import SETTINGS_FILE, STATE_FILE
from ..publishing.heads import head_of
from ..publishing.report.history import Rows
from ..publishing.report.parts import DeployTable, Run, UsedSetting
from ..publishing.report.reading import load_json, read
from ..publishing.report.report import DATA, DistillationReport
from ..publishing.usage import loading_code, shown_source
from .run_report import assemble_report, texts, told


def report_of_folder(folder: str | os.PathLike[str]) -> DistillationReport:
    """Return the report of a training from its output folder, without running a model.

    From `report.json` where it is, else from the newest trainer_state.json and distillation_config.json; a deploy
    table that the report lacks is taken from evaluation.json. Raises `InputError` for a folder without a training,
    or with files that do not fit.
    """
    target = Path(folder)
    evaluation = _first_json([target], EVALUATION_FILE)
    deploy = read(DeployTable, evaluation, EVALUATION_FILE) if evaluation else None
    if (target / DATA).is_file():
        report = DistillationReport.load(target / DATA)
        return report if report.deploy is not None or deploy is None else report.with_deploy(deploy)
    state, place = _newest_state(target)
    rows: Any = read(tuple[Mapping[str, Any], ...], state.get("log_history"), f"{STATE_FILE}.log_history")
    record = _first_json([target, place], SETTINGS_FILE)
    settings = read(tuple[UsedSetting, ...], record.get("settings", []), f"{SETTINGS_FILE}.settings")
    layers = read(Mapping[str, tuple[str, ...]], record.get("layers", {}), f"{SETTINGS_FILE}.layers")
    run = _run_of_files(record, settings, rows, [target, place])
    return assemble_report(run, rows, layers, deploy=deploy)


def _run_of_files(
    record: Mapping[str, Any], settings: tuple[UsedSetting, ...], rows: Rows, folders: Sequence[Path]
) -> Run:
    config = _first_json(folders, "config.json")
    names = read(tuple[str, ...], config.get("architectures") or [], "config.json.architectures")
    teacher = record.get("teacher", "a teacher")
    teachers = [teacher] if isinstance(teacher, str) else read(tuple[str, ...], teacher, f"{SETTINGS_FILE}.teacher")
    kinds = read(Mapping[str, Any], record.get("training", {}), f"{SETTINGS_FILE}.training")
    versions = read(Mapping[str, Any], record.get("versions", {}), f"{SETTINGS_FILE}.versions")
    method = read(str, record.get("method", "Distillation"), f"{SETTINGS_FILE}.method")
    processor = next(
        (auto for name, auto in PROCESSOR_FILES.items() if any((folder / name).is_file() for folder in folders)), None
    )
    code = loading_code(shown_source(str(folders[0])), head_of(names).auto_class, processor) if names else ""
    student = names[0] if names else "a student"
    return Run(method, student, " and ".join(teachers), settings, told(kinds, rows), texts(versions), code)


def _newest_state(folder: Path) -> tuple[Mapping[str, Any], Path]:
    """Return the trainer's state with the most steps in a folder or its checkpoints, and where it lies."""
    found = []
    for path in sorted([folder / STATE_FILE, *folder.glob(f"checkpoint-*/{STATE_FILE}")]):
        if path.is_file():
            state: Any = read(Mapping[str, Any], load_json(path), path.name)
            found.append((read(int, state.get("global_step"), f"{path.name}.global_step"), path.parent, state))
    if not found:
        raise InputError(
            "There is no training in this folder",
            received=f"neither {DATA} nor {STATE_FILE} in {str(folder)!r} or its checkpoints",
            expected="the output_dir of a training, with a checkpoint at least",
            todo="pass that folder, or call trainer.distillation_report().save(folder) after training",
        )
    _, place, state = max(found, key=lambda entry: entry[:2])
    return state, place


def _first_json(folders: Sequence[Path], name: str) -> Mapping[str, Any]:
    """Return the JSON object of a file that may lie in one of several folders; empty without any."""
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    return {} if path is None else read(Mapping[str, Any], load_json(path), name)
