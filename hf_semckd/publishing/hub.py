"""Publishing the plain student: what goes to the Hub is the student, its processor, a card and the settings."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch import nn
from transformers import BaseImageProcessor, FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin, Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from ..errors import HubPushError, SemCKDError, message
from ..files import write_atomic
from .card import create_model_card

logger = logging.getLogger(__name__)

CARD = "README.md"
FEATURE_LOSS_FILE = "feature_loss.safetensors"

STATE = "trainer_state.json"

STAGING_PREFIX = "hf_semckd_push_"

# What a checkpoint holds besides the student: needed to resume, and nobody else's business.
TRAINING_STATE = (
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    STATE,
    "training_args.bin",
    FEATURE_LOSS_FILE,
    "pytorch_model_fsdp*",
    "global_step*",
)

# Heads for which the Hub has a pipeline, by what follows "For" in the class name.
PIPELINES = {
    "ImageClassification": "image-classification",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "CausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "MaskedLM": "fill-mask",
    "QuestionAnswering": "question-answering",
    "SemanticSegmentation": "image-segmentation",
}

PROCESSORS = (
    (PreTrainedTokenizerBase, "AutoTokenizer"),
    (ProcessorMixin, "AutoProcessor"),
    (BaseImageProcessor, "AutoImageProcessor"),
    (FeatureExtractionMixin, "AutoFeatureExtractor"),
)


def upload_student(folder: Path, repo_id: str, *, token: str | None, revision: str | None, commit_message: str) -> Any:
    """Upload a folder that holds the plain student.

    Raises:
        HubPushError: When the upload fails, for whatever reason; the cause is chained.
    """
    try:
        return HfApi().upload_folder(
            repo_id=repo_id, folder_path=folder, token=token, revision=revision, commit_message=commit_message
        )
    except Exception as error:  # any failure of the network or the server: nothing trained may be lost by it
        raise HubPushError(
            "The upload to the Hub failed; nothing is lost",
            received=f"{type(error).__name__}: {error}",
            expected=f"that {repo_id} can be written with your token",
            todo="check the connection and `hf auth whoami`, then call trainer.push_to_hub() again, or later "
            "AutoModelFor...from_pretrained(<output_dir>).push_to_hub(repo_id) with the student that was "
            "saved there",
        ) from error


class PublishingTrainer(Trainer):
    """The part of a trainer that publishes: only the plain student, and never at the price of what was trained.

    Everything is uploaded from a folder made for the purpose, so pictures, logs, optimizer states and pickled
    arguments that lie in the output folder stay there.
    """

    push_in_progress: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, or find it; see `Trainer.init_hf_repo`.

        Raises:
            HubPushError: When that is refused, before any training.
        """
        if private is not None:
            # Older versions take it from the arguments only.
            self.args.hub_private_repo = private
        try:
            super().init_hf_repo(token=token)
        except Exception as error:  # the client raises many kinds, and all mean the same here
            raise HubPushError(_repository_message(self.args.hub_model_id, error)) from error

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Save the student and upload it with its processor and a model card.

        Args:
            commit_message: As in `Trainer.push_to_hub`, like `blocking`, `token`, `revision` and `private`.
            card: What `create_model_card` takes.

        Returns:
            The commit, or a future of it when not blocking; None on other processes than the first.

        Raises:
            HubPushError: When the upload fails; the student is saved in `args.output_dir` by then.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        folder = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX))
        self.save_model(str(folder), _internal_call=True)
        if not self.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)
            return None
        self.create_model_card(**card)
        shutil.copy(Path(self.args.output_dir) / CARD, folder / CARD)
        self._finish_current_push()
        upload = functools.partial(
            _upload_and_discard,
            folder,
            self.hub_model_id,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message or "End of training",
        )
        return upload() if blocking else HfApi().run_as_future(upload)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the student's card to the output folder; arguments as in `Trainer.create_model_card`."""
        if not self.is_world_process_zero():
            return
        data = dataset_tags or dataset
        text = student_card(
            repo_name=model_name or self.hub_model_id or Path(self.args.output_dir).name,
            student=self.student,
            teacher=self._teacher_model,
            settings=self.distillation_settings(),
            metrics=_last_evaluation(self.state.log_history),
            processing_class=self.processing_class,
            dataset=data[0] if isinstance(data, list) else data,
            method="KD" if self.feature_loss is None else self.feature_loss.title,
            license=license,
            language=language,
            tags=tuple([tags] if isinstance(tags, str) else tags or ()),
            base_model=finetuned_from,
        )
        write_atomic(Path(self.args.output_dir) / CARD, text.encode())

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint's student in the background; a failure is logged and training goes on."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        folder = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX))
        try:
            self._stage_checkpoint(Path(checkpoint_folder), folder)
        except (OSError, SemCKDError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            logger.error("A checkpoint could not be made ready for the Hub, and training goes on. %s", error)
            return
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        moment = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch or 0)}"
        job = HfApi().run_as_future(
            _upload_quietly,
            folder,
            self.hub_model_id,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            commit_message=f"Training in progress, {moment}",
        )
        if busy:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def _stage_checkpoint(self, checkpoint: Path, folder: Path) -> None:
        """Copy what is published of a checkpoint to a folder: the student, and the whole of it where that is asked."""
        strategy = self.args.hub_strategy
        shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*TRAINING_STATE), dirs_exist_ok=True)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            shutil.copytree(checkpoint, folder / name)
            _hide_local_path(folder / name / STATE)
        self.create_model_card()
        shutil.copy(Path(self.args.output_dir) / CARD, folder / CARD)


def _upload_and_discard(
    folder: Path, repo_id: str, *, token: str | None, revision: str | None, commit_message: str
) -> Any:
    try:
        return upload_student(folder, repo_id, token=token, revision=revision, commit_message=commit_message)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _upload_quietly(
    folder: Path, repo_id: str, *, token: str | None, revision: str | None, commit_message: str
) -> Any:
    try:
        return _upload_and_discard(folder, repo_id, token=token, revision=revision, commit_message=commit_message)
    except HubPushError as error:
        logger.error("A push during training failed, and training goes on. %s", error)
        return None


def _hide_local_path(state_file: Path) -> None:
    """Keep only the last part of the one path that a trainer's state holds, that of the best checkpoint."""
    state = json.loads(state_file.read_text(encoding="utf-8"))
    if state.get("best_model_checkpoint"):
        state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
        state_file.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _last_evaluation(history: list[dict[str, Any]]) -> dict[str, float]:
    """Return the quality metrics of the last evaluation in the log, by their names without `eval_`."""
    entry: dict[str, Any] = next((row for row in reversed(history) if any(key.startswith("eval_") for key in row)), {})
    speeds = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
    return {key: float(value) for key, value in named.items() if key not in speeds and isinstance(value, (int, float))}


def _repository_message(repo_id: str | None, error: Exception) -> str:
    return message(
        "The Hub repository could not be created or found",
        received=f"{repo_id or 'a name from output_dir'} ({type(error).__name__}: {error})",
        expected="a repository that your token may write, and a connection to the Hub",
        todo="log in with `hf auth login`, check hub_model_id, or set push_to_hub=False and call "
        "trainer.push_to_hub() after training",
    )


def student_card(
    *,
    repo_name: str,
    student: nn.Module,
    teacher: nn.Module | None,
    settings: Mapping[str, Any],
    metrics: Mapping[str, float],
    processing_class: Any,
    dataset: str | None,
    method: str,
    license: str | None = None,
    language: str | None = None,
    tags: tuple[str, ...] = (),
    base_model: str | None = None,
) -> str:
    """Return the text of the student's model card.

    Args:
        repo_name: Name of the repository, its title.
        student: The plain student.
        teacher: The teacher, for its name and size.
        settings: What was asked of the distillation.
        metrics: Evaluation metrics by name.
        processing_class: The processor saved beside the student, or None.
        dataset: Hub id of the dataset, or None.
        method: Name of the method that was used.
        license: As in the card's metadata.
        language: As in the card's metadata.
        tags: Further tags.
        base_model: Where the student started; by default what its configuration remembers.
    """
    head = auto_class(student)
    processor = next((name for kind, name in PROCESSORS if isinstance(processing_class, kind)), None)
    return create_model_card(
        repo_name=repo_name,
        student_class=head[0],
        pipeline_tag=head[1],
        base_model=base_model or _source(student),
        teacher=_source(teacher) or (type(teacher).__name__ if teacher is not None else None),
        dataset=dataset,
        metrics=metrics,
        configuration=settings,
        parameters=count_parameters(student),
        teacher_parameters=count_parameters(teacher) if teacher is not None else None,
        license=license,
        language=language,
        processor=processor,
        tags=tags,
        method=method,
    )


def auto_class(model: nn.Module) -> tuple[str, str | None]:
    """Return the auto class that loads a model's head, and the Hub's pipeline tag for it."""
    name = type(model).__name__
    for head, pipeline in PIPELINES.items():
        if name.endswith(head):
            return f"AutoModelFor{'CausalLM' if head == 'LMHeadModel' else head}", pipeline
    return "AutoModel", None


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _source(model: nn.Module | None) -> str | None:
    """Return the Hub id that a model was loaded from; folders and nothing give None."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if name and not os.path.exists(name) and not Path(name).is_absolute() else None
