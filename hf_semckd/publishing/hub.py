"""Publishing the plain student: the Hub gets the student, its processor, a model card and the settings."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..errors import HubPushError
from ..files import write_atomic
from .card import create_model_card, linked_files, renamed_card
from .facts import StudentFacts
from .folder import ADAPTER_FILE, CARD, published_content
from .push import make_branch, push_command, push_errors

logger = logging.getLogger(__name__)


class Publisher:
    """Uploads the plain student; a failing upload loses nothing.

    Uploads come from a staging folder, so that pictures, logs, optimizer states and pickled arguments in the output
    folder stay private. Only `output_dir` and what is about the Hub are read of `args`. `training_state` are glob
    patterns of files that only resuming needs, published with whole checkpoints alone. `repo_id` is set once the
    repository is found.
    """

    def __init__(self, args: TrainingArguments, *, is_main: bool, training_state: Sequence[str] = ()):
        self.args = args
        self.repo_id: str | None = None
        self._is_main = is_main
        self._training_state = training_state
        # One client runs all background uploads in order, one at a time.
        self._api = HfApi()
        self._jobs: list[Future[Any]] = []

    @property
    def name(self) -> str:
        """The repository's id, or the name that it is created under."""
        return self.repo_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def create_repository(self, token: str | None = None, private: bool | None = None, *, saved: bool = False) -> None:
        """Create the repository, or find it; raises `HubPushError` when the Hub refuses or cannot be reached.

        None means `args.hub_token` for the token, and `args.hub_private_repo` for whether a new one is private.
        `saved` tells that the student is in the output folder.
        """
        if not self._is_main:
            return
        private = self.args.hub_private_repo if private is None else private
        todo = "log in with `hf auth login`, check hub_model_id, or set push_to_hub=False and push after training"
        if saved:
            todo = f"log in with `hf auth login`, then run: {self._command(private, self.args.hub_revision)}"
        with push_errors("The Hub repository could not be created or found", self.name, todo):
            url = self._api.create_repo(self.name, token=token or self.args.hub_token, private=private, exist_ok=True)
        self.repo_id = url.repo_id

    def push(
        self,
        save_student: Callable[[str], None],
        write_card: Callable[[], None],
        *,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save the student to the output folder and upload it with its processor and a model card.

        Returns the commit, or its future when not blocking; None on other processes than the main one. When the upload
        fails, with `HubPushError`, student and card are in the output folder, and the message says how to push them.

        Args:
            save_student: Saves the plain student and its processor to a folder; called on every process.
            write_card: Writes the model card to the output folder.
            token, private: As in `create_repository`.
            revision: Branch to commit to; None: `args.hub_revision`.
        """
        save_student(self.args.output_dir)
        has_card = self._is_main and _succeeds(write_card)
        if self.repo_id is None:
            self.create_repository(token, private, saved=True)
        with ExitStack() as staged:
            folder = _staging_folder(staged)
            save_student(str(folder))
            if not self._is_main:
                return None
            self._stage_card(folder, has_card)
            self.wait()
            upload = partial(self._upload, staged.pop_all(), folder, commit_message, token, revision)
            return upload() if blocking else self._api.run_as_future(upload)

    def push_checkpoint(self, checkpoint: Path, moment: str, write_card: Callable[[], None]) -> None:
        """Upload a checkpoint's student in the background, as `args.hub_strategy` says.

        A failure is logged and training goes on. While another upload is running, the checkpoint is skipped unless
        `args.hub_always_push` is set. `moment` ("step 500", "epoch 3") is for the commit's title.
        """
        if not self._is_main or self.args.hub_strategy == HubStrategy.END:
            return
        self._jobs = [job for job in self._jobs if not job.done()]
        if self._jobs and not self.args.hub_always_push:
            return
        with ExitStack() as staged:
            folder = _staging_folder(staged)
            try:
                self._stage_checkpoint(checkpoint, folder)
                self._stage_card(folder, _succeeds(write_card))
            except OSError as error:
                logger.error("A checkpoint could not be prepared for the Hub, and training goes on. %s", error)
                return
            message = f"Training in progress, {moment}"
            self._jobs.append(self._api.run_as_future(self._upload_or_log, staged.pop_all(), folder, message))

    def write_card(self, facts: StudentFacts) -> None:
        """Write the student's model card to the output folder."""
        write_atomic(Path(self.args.output_dir) / CARD, create_model_card(facts).encode())

    def wait(self) -> None:
        """Wait until no checkpoint is being uploaded."""
        wait(self._jobs)

    def _stage_checkpoint(self, checkpoint: Path, folder: Path) -> None:
        """Copy the student to a folder, and beside it the whole checkpoint where the strategy wants that."""
        strategy = self.args.hub_strategy
        shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*self._training_state), dirs_exist_ok=True)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            shutil.copytree(checkpoint, folder / name, ignore=shutil.ignore_patterns(CARD))
            # The one path in a trainer's state is that of the best checkpoint: its last part must do.
            state_file = folder / name / "trainer_state.json"
            state = json.loads(state_file.read_text(encoding="utf-8"))
            if state.get("best_model_checkpoint"):
                state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
                state_file.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _stage_card(self, folder: Path, has_card: bool) -> None:
        """Take local paths out of a folder, and copy the card, under the repository's id, and what it shows to it."""
        for path in folder.rglob(ADAPTER_FILE):
            content = published_content(path)
            if isinstance(content, bytes):
                path.write_bytes(content)
        if not has_card:
            (folder / CARD).unlink(missing_ok=True)
            return
        written = Path(self.args.output_dir)
        card = (written / CARD).read_text(encoding="utf-8")
        renamed = renamed_card(card, self.name)
        if renamed != card:
            write_atomic(written / CARD, renamed.encode())
        for name in (CARD, *linked_files(card)):
            shutil.copy(written / name, folder)

    def _upload(
        self, staged: ExitStack, folder: Path, message: str, token: str | None = None, revision: str | None = None
    ) -> CommitInfo:
        """Upload a staging folder, and remove it whatever happens."""
        branch, token = revision or self.args.hub_revision, token or self.args.hub_token
        todo = f"check the connection and `hf auth whoami`, then run: {self._command(None, branch)}"
        with staged, push_errors("The upload to the Hub failed; nothing is lost", self.name, todo):
            make_branch(self._api, self.name, branch, token)
            return self._api.upload_folder(
                repo_id=self.name, folder_path=folder, commit_message=message, token=token, revision=branch
            )

    def _command(self, private: bool | None, revision: str | None) -> str:
        return push_command(self.args.output_dir, self.name, private, revision)

    def _upload_or_log(self, staged: ExitStack, folder: Path, message: str) -> None:
        try:
            self._upload(staged, folder, message)
        except HubPushError as error:
            logger.error("A push during training failed, and training goes on. %s", error)


def _succeeds(write_card: Callable[[], None]) -> bool:
    """Write the card; one that cannot be written costs only itself."""
    try:
        write_card()
    except Exception as error:  # of whatever it is made from
        logger.warning("The model card could not be written, and the student is pushed without one. %s", error)
        return False
    return True


def _staging_folder(staged: ExitStack) -> Path:
    """Return a new folder that lives until the stack is closed."""
    return Path(staged.enter_context(TemporaryDirectory(prefix="hf_semckd_push_", ignore_cleanup_errors=True)))
