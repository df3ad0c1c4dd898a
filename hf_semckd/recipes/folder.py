"""The output folder of a recipe: whose it is, how far its training went, and what is kept there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState

from ..errors import ConfigurationError
from ..files import write_json
from ..training.sealing import newest_whole

RECIPE, TEACHER, START, ONNX = "recipe.json", "teacher", "start", "onnx"
# Options that change neither the student nor what is told of it.
FREE = frozenset(
    "output_dir report_to logging_steps logging_strategy logging_first_step disable_tqdm log_level run_name project "
    "trackio_space_id push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision "
    "dataloader_num_workers dataloader_pin_memory per_device_eval_batch_size max_eval_samples save_total_limit "
    "save_steps save_strategy teacher_cache_dir teacher_cache_limit_gb teacher_compile onnx metric".split()
)


class RunFolder:
    """The folder of one recipe; every process reads it, and the main one writes."""

    def __init__(self, path: str):
        self.path = Path(path)

    def claim(self, options: Mapping[str, Any], *, is_main: bool) -> None:
        """Write down the options of a recipe; `ConfigurationError` where the folder holds something else's results."""
        known = self._notes()
        kept = {name: str(value) for name, value in options.items() if name not in FREE}
        if known is None:
            if any((self.path / name).exists() for name in ("config.json", "model.safetensors", "trainer_state.json")):
                raise ConfigurationError(
                    "The output folder holds a model that no recipe made",
                    received=str(self.path),
                    expected="a new folder, or that of an earlier run of this recipe",
                    todo="set output_dir to another folder",
                )
            if is_main:
                write_json(self.path / RECIPE, {"options": kept, "trained": False})
            return
        before = known["options"]
        changed = [name for name in {**before, **kept} if before.get(name) != kept.get(name)]
        if changed and not self.begun:
            # A run that was refused before it trained anything, such as for a wrong name, binds to nothing.
            if is_main:
                shutil.rmtree(self.path / START, ignore_errors=True)
                write_json(self.path / RECIPE, {"options": kept, "trained": False})
        elif changed:
            pairs = ((name, before.get(name, "not given"), kept.get(name, "not given")) for name in changed)
            listed = ", ".join(f"{name} was {old}, is {new}" for name, old, new in pairs)
            raise ConfigurationError(
                "The output folder holds a run with other options, so it cannot be continued",
                received=listed,
                expected="the same options, or another folder",
                todo="set output_dir to a new folder, or remove this one to start anew",
            )

    @property
    def trained(self) -> bool:
        """Whether the student here is finished."""
        notes = self._notes()
        return notes is not None and bool(notes.get("trained")) and (self.path / "config.json").is_file()

    def finish(self) -> None:
        """Write down that the student is finished; what only resuming needs goes."""
        notes = self._notes() or {"options": {}}
        write_json(self.path / RECIPE, {**notes, "trained": True})
        shutil.rmtree(self.path / START, ignore_errors=True)

    def state(self) -> TrainerState:
        """Return the state of the finished training, with all that was logged."""
        return TrainerState.load_from_json(str(self.path / "trainer_state.json"))

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
