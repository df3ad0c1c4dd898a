"""The output folder of a recipe: whose it is, how far its training went, and what is kept there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState

from ..errors import ConfigurationError
from ..files import write_json
from ..publishing.folder import STATE_FILE
from ..training.sealing import checksum, newest_whole

RECIPE, TEACHER, START, ONNX = "recipe.json", "teacher", "start", "onnx"
# Options that change neither the student nor what is told of it.
FREE = frozenset(
    "output_dir report_to logging_steps logging_strategy logging_first_step disable_tqdm log_level run_name project "
    "trackio_space_id push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision "
    "dataloader_num_workers dataloader_pin_memory per_device_eval_batch_size max_eval_samples save_total_limit "
    "save_steps save_strategy teacher_cache_dir teacher_cache_limit_gb teacher_compile onnx metric".split()
)


def _plain(value: Any) -> str:
    """Return an option as text, paths that mean the same alike."""
    values = value if isinstance(value, list) else [value]
    texts = [
        os.path.normpath(entry) if isinstance(entry, str) and os.path.exists(entry) else entry for entry in values
    ]
    return str(texts if isinstance(value, list) else texts[0])


def _binding(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the options that a run here must keep, as texts."""
    return {name: _plain(value) for name, value in options.items() if name not in FREE}


class RunFolder:
    """The folder of one recipe; every process reads it, and the main one writes."""

    def __init__(self, path: str):
        self.path = Path(path)

    def claim(self, options: Mapping[str, Any], *, is_main: bool) -> None:
        """Write down the options of a recipe; `ConfigurationError` where the folder holds something else's results."""
        if not self.check(options) and is_main:
            shutil.rmtree(self.path / START, ignore_errors=True)
            write_json(self.path / RECIPE, {"options": _binding(options), "trained": False})

    def check(self, options: Mapping[str, Any]) -> bool:
        """Tell whether a run with these options has begun here; `ConfigurationError` where another one has.

        A run that was refused before it trained anything, such as for a wrong name, binds the folder to nothing.
        """
        known, kept = self._notes(), _binding(options)
        if known is None:
            if self.path.is_dir() and any(not path.name.startswith(".") for path in self.path.iterdir()):
                raise ConfigurationError(
                    "The output folder holds something that no recipe made",
                    received=str(self.path),
                    expected="a new or empty folder, or that of an earlier run of this recipe",
                    todo="set output_dir to another folder",
                )
            return False
        before = known["options"]
        changed = [name for name in {**before, **kept} if before.get(name) != kept.get(name)]
        if changed and not self.begun:
            return False
        if changed:
            pairs = ((name, before.get(name, "not given"), kept.get(name, "not given")) for name in changed)
            listed = ", ".join(f"{name} was {old}, is {new}" for name, old, new in pairs)
            taught = self.ready(TEACHER)
            more = (
                "" if taught is None else f"; its teacher can be used there: teacher: {taught}, without teacher_epochs"
            )
            raise ConfigurationError(
                "The output folder holds a run with other options, so it cannot be continued",
                received=listed,
                expected="the same options, or another folder",
                todo=f"set output_dir to a new folder, or remove this one to start anew{more}",
            )
        return True

    @property
    def trained(self) -> bool:
        """Whether the student here is finished."""
        notes = self._notes()
        return notes is not None and bool(notes.get("trained")) and (self.path / "config.json").is_file()

    def finish(self) -> None:
        """Write down that the student is finished; what only resuming needs goes."""
        notes = self._notes() or {"options": {}}
        write_json(self.path / RECIPE, {**notes, "trained": True, "weights": self._weights()})
        shutil.rmtree(self.path / START, ignore_errors=True)

    def check_weights(self) -> None:
        """Raise `ConfigurationError` where the student's weights are no longer those that were trained here."""
        notes = self._notes()
        if notes is not None and notes.get("weights") not in (None, self._weights()):
            raise ConfigurationError(
                "The student in the output folder is not the one that was trained there",
                received=f"other weights in {self.path}",
                expected="the files that the run wrote",
                todo="set output_dir to another folder, or remove this one to start anew",
            )

    def _weights(self) -> dict[str, str]:
        return {path.name: checksum(path) for path in sorted(self.path.glob("*.safetensors"))}

    def tell(self, by: Mapping[str, Any]) -> None:
        """Write down what the results were made by: metric, samples."""
        write_json(self.path / RECIPE, {**(self._notes() or {"options": {}}), "told": dict(by)})

    def is_told(self, by: Mapping[str, Any]) -> bool:
        """Whether results were made by the same."""
        notes = self._notes()
        return notes is not None and notes.get("told") == dict(by)

    def state(self) -> TrainerState:
        """Return the state of the finished training, with all that was logged."""
        return TrainerState.load_from_json(str(self.path / STATE_FILE))

    def newest_checkpoint(self) -> str | None:
        """Return the newest whole checkpoint, or None where there is none yet."""
        return newest_whole(self.path)

    def ready(self, name: str) -> str | None:
        """Return a model's folder within this one, where it is complete."""
        folder = self.path / name
        return str(folder) if (folder / "complete").is_file() else None

    def mark_ready(self, name: str) -> None:
        """Write down that a model's folder is complete."""
        (self.path / name / "complete").touch()

    @property
    def begun(self) -> bool:
        """Whether there is anything that was trained with the options written down."""
        own = RunFolder(str(self.path / TEACHER)).newest_checkpoint() or self.ready(TEACHER)
        return self.trained or bool(own or self.newest_checkpoint())

    def _notes(self) -> dict[str, Any] | None:
        blocking = next((path for path in (self.path, *self.path.parents) if path.is_file()), None)
        if blocking is not None:
            raise ConfigurationError(
                "The output folder cannot be made: a file is in its place",
                received=str(blocking),
                expected="a folder",
                todo="set output_dir to another folder",
            )
        try:
            notes = json.loads((self.path / RECIPE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            notes = None
        if isinstance(notes, dict) and isinstance(notes.get("options"), dict):
            return notes
        raise ConfigurationError(
            "The notes of the output folder cannot be read",
            received=str(self.path / RECIPE),
            expected="what `hf-semckd distill` wrote",
            todo="set output_dir to another folder",
        )
