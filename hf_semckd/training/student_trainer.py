"""A trainer whose student stays a plain model: in checkpoints, in what it saves, and on the Hub."""

import itertools
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import SaveStrategy

from ..config import SemCKDConfig
from ..data.samples import column_names
from ..evaluation.table import Evaluation
from ..losses import FeatureLoss
from ..publishing.card import ASSOCIATION_PICTURE, EVALUATION_FILE, EVALUATION_PICTURE
from ..publishing.facts import StudentFacts, environment, last_evaluation, model_facts
from ..publishing.hub import Publisher
from ..publishing.report.report import DistillationReport
from ..publishing.sources import dataset_source, warn_of_license
from ..publishing.usage import shown_source
from ..teacher.cached import CachedTeacher
from .attachment import without_feature_loss
from .checkpoint import (
    TRAINING_STATE,
    finish_folder,
    recorded_arguments,
    reload_student,
    resume_feature_loss,
    save_feature_loss,
)
from .distillation import Distillation
from .pair import Pair
from .reasons import used_settings
from .run_report import assemble_report, check_trained, compare_or_say_why, deploy_table, trained_run
from .sealing import refuse_non_finite, seal


class StudentTrainer(Trainer):
    """`transformers.Trainer` that saves, reloads and publishes the student without what it is trained with.

    Without distillation `pair` and `distillation` are None, the latter also before it is built.
    """

    args: SemCKDConfig
    pair: Pair | None
    distillation: Distillation | None
    _signature_columns: list[str] | None

    @property
    def student(self) -> Any:
        """The plain student; while training it holds the feature loss as a submodule."""
        model = self.model
        return None if model is None else self.accelerator.unwrap_model(model, keep_torch_compile=False)

    @property
    def teacher(self) -> Any:
        """The frozen teacher in evaluation mode, or None without distillation; loaded now if it was not needed yet.

        Several come as an `nn.ModuleList`.
        """
        if self.pair is None:
            return None
        teachers = self.pair.teachers
        models = [(teacher.load() if isinstance(teacher, CachedTeacher) else teacher).model for teacher in teachers]
        return models[0] if len(models) == 1 else nn.ModuleList(models).eval()

    @property
    def student_layer_names(self) -> list[str]:
        """Names of the student layers that are captured: hidden-state indices or module names.

        Between CNNs SemCKD leaves the last one to the logits (`feature_loss.compared` tells how many learn).
        """
        return [] if self.pair is None else self.pair.student_layer_names

    @property
    def teacher_layer_names(self) -> list[str]:
        """Names of the teacher layers that are learned from; of several teachers `teachers.0.1` and the like."""
        return [] if self.pair is None else self.pair.teacher_layer_names

    @property
    def feature_loss(self) -> FeatureLoss | None:
        """The feature loss that is trained with the student, or None."""
        return None if self.distillation is None else self.distillation.loss

    def association(self) -> np.ndarray | None:
        """Return the mean association weights (student_layer, teacher_layer) of the last logging window, or None.

        Rows add up to 1 over the teacher layers; also those of layers that are left to the logits. The layers
        of several teachers stand side by side, and those of each add up to its share of `teacher_weights`.
        """
        found = None if self.distillation is None else self.distillation.monitor.last_association
        return None if found is None else found.copy()

    def distillation_settings(self) -> dict[str, Any]:
        """Return the settings of the distillation, with what is used where they were left open, ready for JSON."""
        return self.args.distillation_settings() if self.distillation is None else dict(self.distillation.settings)

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
                sharded=not self._reloads_here,
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

    @property
    def _layer_names(self) -> dict[str, list[str]]:
        return {"student_layers": self.student_layer_names, "teacher_layers": self.teacher_layer_names}

    def _set_signature_columns_if_needed(self) -> None:
        """Keep what the teacher takes besides what the student takes; `_prepare_inputs` tells them apart."""
        first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        kept = self._signature_columns
        if first and self.pair is not None and kept is not None:
            extra = self.pair.router.extra_columns(kept, column_names(self.train_dataset))
            self._signature_columns = [*kept, *extra]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        return inputs if self.pair is None or self.model.training else self.pair.router.student_inputs(inputs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count the student's operations alone: neither the teacher nor the feature loss stays."""
        if self.distillation is None or not self.distillation.attached:
            return super().floating_point_ops(inputs)
        return self.distillation.student_operations(inputs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict with the student as it will be; see `Trainer.evaluation_loop`."""
        with self._finished_student():
            return super().evaluation_loop(*args, **kwargs)

    def _finished_student(self) -> ExitStack:
        """Return a context in which the student is what it will be in the end; SimKD gives it another classifier."""
        finished = ExitStack()
        if self.distillation is not None:
            finished.callback(self.distillation.finish_student())
        return finished

    def _plain_student(self) -> AbstractContextManager[None]:
        return nullcontext() if self.distillation is None else self.distillation.plain_student()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._finished_student():
            if self.distillation is not None:
                self.distillation.guard.check_pending(self.state.global_step)
            if self._reloads_here:
                named = itertools.chain(self.model.named_parameters(), self.model.named_buffers())
                refuse_non_finite(named, self.state.global_step)
            super()._save_checkpoint(model, trial)
        if not self.args.push_to_hub:
            self._seal(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}")

    def _seal(self, checkpoint: Path) -> None:
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self._plain_student():
            super()._save(output_dir, None if state_dict is None else without_feature_loss(state_dict))
        if self.args.should_save and self.pair is not None:
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            settings, layers = self.distillation_settings(), self._layer_names
            reasons = used_settings(self.args, settings, layers, self.feature_loss)
            record = {"method": self._method, "layers": layers, "settings": reasons}
            arguments = recorded_arguments(self.args, self.state)
            models = self.student, self.pair.teacher_models
            finish_folder(folder, arguments, *models, settings, record, self.train_dataset)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        distillation, loss = self.distillation, self.feature_loss
        if distillation is not None and loss is not None and distillation.attached and self._reloads_here:
            # What the last step observed belongs to this checkpoint, on every process.
            services = distillation.objective.services
            loss.synchronize(services.reduce_sum, rank=services.rank, world=services.processes)
            if self.args.should_save:
                save_feature_loss(loss, output_dir)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        distillation = self.distillation
        if distillation is None or not self._reloads_here:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with distillation.plain_student():
            if isinstance(self.model, PreTrainedModel):
                reload_student(self.model, resume_from_checkpoint)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        if distillation.attached and distillation.loss is not None:
            resume_feature_loss(distillation.loss, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        reloads = self.distillation is not None and self._reloads_here and best is not None
        with self._plain_student():
            if reloads and isinstance(self.model, PreTrainedModel):
                reload_student(self.model, best)
            else:
                super()._load_best_model()

    @property
    def _reloads_here(self) -> bool:
        """Whether checkpoints hold whole tensors; FSDP and DeepSpeed carry the feature loss in their own state."""
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

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

    @property
    def _method(self) -> str:
        return "KD" if self.feature_loss is None else self.feature_loss.title

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._seal(Path(checkpoint_folder))
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        moment = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch or 0)}"
        self._publisher.push_checkpoint(Path(checkpoint_folder), moment, self.create_model_card)

    def _finish_current_push(self) -> None:
        self._publisher.wait()


def _first(given: str | list[str] | None) -> str | None:
    return given[0] if isinstance(given, list) and given else given or None  # type: ignore[return-value]
