"""Trainer's hooks that publish."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from ..publishing.facts import last_evaluation, model_facts
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
        return Publisher(self.args, is_main=self.is_world_process_zero(), training_state=TRAINING_STATE)

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
        """Upload the student, its processor and its card; see `Publisher.push`. `card` goes to `create_model_card`."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        result = self._publisher.push(
            partial(self.save_model, _internal_call=True),
            partial(self.create_model_card, **card),
            commit_message=commit_message or "End of training",
            blocking=blocking,
            token=token,
            revision=revision,
            private=private,
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
        if not self.is_world_process_zero():
            return
        name = model_name or self._publisher.name
        known = model_facts(name, self.student, self._teacher_model, self.processing_class)
        data = dataset_tags or dataset
        facts = replace(
            known,
            base_model=finetuned_from or known.base_model,
            dataset=data[0] if isinstance(data, list) else data,
            method="KD" if self.feature_loss is None else self.feature_loss.title,
            settings=self.distillation_settings(),
            metrics=last_evaluation(self.state.log_history),
            license=license,
            language=language,
            tags=tags,
        )
        self._publisher.write_card(facts)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        moment = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch or 0)}"
        self._publisher.push_checkpoint(Path(checkpoint_folder), moment, self.create_model_card)

    def _finish_current_push(self) -> None:
        self._publisher.wait()
