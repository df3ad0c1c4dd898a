"""Trainer's hooks about the Hub, and what `Publisher` needs of a trainer."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from ..publishing.card import create_model_card
from ..publishing.facts import CardOptions, last_evaluation, student_facts
from ..publishing.hub import TRAINER_STATE, Publisher
from .checkpoint import FEATURE_LOSS_FILE

# A checkpoint's files beside the student.
TRAINING_STATE = (
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    TRAINER_STATE,
    "training_args.bin",
    FEATURE_LOSS_FILE,
    "pytorch_model_fsdp*",
    "global_step*",
)


class PublishingTrainer(Trainer):
    """Publishes through a `Publisher`; a base of `DistillationTrainer`."""

    @cached_property
    def _publisher(self) -> Publisher:
        return Publisher(
            self.args,
            save_student=lambda folder: self.save_model(folder, _internal_call=True),
            card_text=self._card_text,
            is_main=self.is_world_process_zero(),
            training_state=TRAINING_STATE,
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, or find it; see `Publisher.create_repository`."""
        self._publisher.create_repository(token, private)
        self.hub_model_id = self._publisher.repo_id

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Upload the student with its processor and a model card; see `Publisher.push`. `card`: see `CardOptions`."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        where: dict[str, Any] = {"token": token, "revision": revision, "private": private}
        result = self._publisher.push(
            commit_message or "End of training", CardOptions(**card), blocking=blocking, **where
        )
        self.hub_model_id = self._publisher.repo_id
        return result

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
        if self.is_world_process_zero():
            given = (language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args)
            self._publisher.write_card(CardOptions(*given))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        moment = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch or 0)}"
        self._publisher.push_checkpoint(Path(checkpoint_folder), moment)

    def _finish_current_push(self) -> None:
        self._publisher.wait()

    def _card_text(self, title: str, options: CardOptions) -> str:
        facts = student_facts(
            title,
            options,
            student=self.student,
            teacher=self._teacher_model,
            processing_class=self.processing_class,
            method="KD" if self.feature_loss is None else self.feature_loss.title,
            settings=self.distillation_settings(),
            metrics=last_evaluation(self.state.log_history),
        )
        return create_model_card(facts)
