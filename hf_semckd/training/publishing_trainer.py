"""A trainer that reports what was learned, writes the student's card and publishes it."""

from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import SaveStrategy

from ..evaluation.table import Evaluation
from ..publishing.card import ASSOCIATION_PICTURE, EVALUATION_FILE, EVALUATION_PICTURE
from ..publishing.facts import StudentFacts, environment, last_evaluation, model_facts
from ..publishing.hub import Publisher
from ..publishing.report.report import DistillationReport
from ..publishing.sources import dataset_source, warn_of_license
from ..publishing.usage import shown_source
from .checkpoint import TRAINING_STATE, recorded_arguments
from .reasons import used_settings
from .run_report import assemble_report, check_trained, compare_or_say_why, deploy_table, trained_run
from .student_trainer import StudentTrainer


class PublishingTrainer(StudentTrainer):
    """A `StudentTrainer` with the report of a training, the model card and the Hub."""

    def distillation_report(self, evaluation: Evaluation | None = None, dataset: Any = None) -> DistillationReport:
        """Return what was learned and what the student is worth; `report.save(folder)` writes it as a page.

        Student and teacher run on up to 512 labeled samples, for which a cached teacher is loaded.

        Args:
            evaluation: What `evaluate` found of teacher and student; without it the report has no deploy table.
            dataset: The labeled samples, prepared as `eval_dataset`, which is the default.

        Raises:
            InputError: Before any training, and without distillation.
        """
        check_trained(self.distillation is not None, self.state.log_history)
        assert self.pair is not None
        with self._finished_student():
            comparison, why = compare_or_say_why(
                self.student,
                lambda: list(self.teacher) if isinstance(self.teacher, nn.ModuleList) else [self.teacher],
                self.eval_dataset if dataset is None else dataset,
                sharded=not self._reloads_here or any(teacher.runs_together for teacher in self.pair.teachers),
                weights=self.pair.weights,
                processing_class=self.processing_class,
                data_collator=self.data_collator,
                batch_size=self.args.per_device_eval_batch_size,
            )
        source = self._publisher.repo_id or shown_source(self.args.output_dir)
        facts, rows = self._student_facts(source), self.state.log_history
        settings = used_settings(self.args, self.distillation_settings(), self._layer_names, self.feature_loss)
        arguments = recorded_arguments(self.args, self.state)
        run = trained_run(facts, arguments, rows, settings, type(self.student).__name__)
        deploy = deploy_table(evaluation)
        return assemble_report(run, rows, self._layer_names, deploy=deploy, comparison=comparison, why=why)

    # ---- The Hub -----------------------------------------------------------------------------------------------

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
        evaluation: Evaluation | None = None,
    ) -> None:
        """Write the student's card to the output folder; arguments as in `Trainer.create_model_card`.

        Args:
            license: None: that of the models that the student was made from, where all are known.
            tasks: Pipeline tag; None: that of the student's head.
            dataset_tags, dataset: Hub id, or a description in words; None: the id that the training data came from.
            evaluation: Of teacher and student, for the deploy table; it is saved beside the card.
        """
        if not self.is_world_process_zero():
            return
        known, files = self._student_facts(model_name or self._publisher.name), self._card_files(evaluation)
        # A card that stays here may wait.
        if license is None and not self.is_in_train and self._publisher.repo_id is not None:
            warn_of_license(known.sources)
        facts = replace(
            known,
            base_model=finetuned_from or known.base_model,
            pipeline_tag=_first(tasks) or known.pipeline_tag,
            dataset=_first(dataset_tags) or _first(dataset) or dataset_source(self.train_dataset),
            settings=self.distillation_settings(),
            training=recorded_arguments(self.args, self.state),
            versions=environment(),
            metrics=last_evaluation(self.state.log_history),
            evaluation=None if evaluation is None else asdict(evaluation),
            files=files,
            license=license,
            language=language,
            tags=tags,
        )
        self._publisher.write_card(facts)

    def _student_facts(self, name: str) -> StudentFacts:
        """Return what the models tell; once training has ended, the cards of the Hub as well."""
        teachers = [] if self.pair is None else self.pair.teacher_models
        online = self._publisher.repo_id is not None and not self.is_in_train
        with self._plain_student():
            known = model_facts(name, self.student, teachers, self.processing_class, online=online)
        return replace(known, method=self._method)

    def _card_files(self, evaluation: Evaluation | None) -> list[str]:
        """Save an evaluation, and return the files that the card may show: none that an earlier run left behind."""
        folder, found = Path(self.args.output_dir), list[str]()
        if evaluation is not None:
            evaluation.save(folder)
            found += [EVALUATION_PICTURE, EVALUATION_FILE]
        if self.association() is not None and not self.is_in_train:
            found.append(ASSOCIATION_PICTURE)
        return [name for name in found if (folder / name).is_file()]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._seal(Path(checkpoint_folder))
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        moment = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch or 0)}"
        self._publisher.push_checkpoint(Path(checkpoint_folder), moment, self.create_model_card)

    def _finish_current_push(self) -> None:
        self._publisher.wait()


def _first(given: str | list[str] | None) -> str | None:
    return given[0] if isinstance(given, list) and given else given or None  # type: ignore[return-value]
