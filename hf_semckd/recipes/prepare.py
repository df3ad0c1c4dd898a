"""Everything before the training of a student: rows, classes, teachers, the student and its samples."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from torch import nn

from ..config import SemCKDConfig
from ..data.samples import collate
from ..errors import InputError
from ..models.sizes import count_parameters
from ..training.trainer import DistillationTrainer
from .classes import Classes, as_by_teacher, find_classes
from .data import Samples, chosen_rows, flat_translations, make_samples
from .folder import START, TEACHER, RunFolder
from .models import (
    cut_student,
    has_head,
    head_of,
    load_teacher,
    needs_batch,
    new_model,
    own_names,
    read_config,
)
from .processors import load_processor, longest_input
from .progress import Voice, use_progress
from .schema import DataOptions, Recipe
from .scores import training_metrics
from .sources import Splits, load_splits
from .tasks import find_task, task_columns
from .tasks.base import Columns, Task

CALIBRATION_SAMPLES = 32


@dataclass(frozen=True)
class Rows:
    """The rows of a recipe and what they are about."""

    kind: type[Task]
    columns: Columns
    classes: Classes | None
    splits: Splits

    def task(self, options: DataOptions, length: int) -> Task:
        """Return what makes samples of the rows."""
        return self.kind(self.columns, self.classes, options, length)


@dataclass(frozen=True)
class Prepared:
    """What a trainer of the student is made of."""

    rows: Rows
    teachers: list[nn.Module]
    student: nn.Module
    samples: Samples


def read_rows(recipe: Recipe, voice: Voice) -> Rows:
    """Load the rows, find out what they are about, and number their classes as the teacher does."""
    options, source = recipe.data, (recipe.models.teacher or [""])[0]
    config = read_config(source, "teacher")
    splits = flat_translations(load_splits(options))
    features = splits.train.features
    kind = find_task(getattr(config, "architectures", None) or (), features, options)
    columns = task_columns(kind, features, options)
    splits, dropped = chosen_rows(splits, columns)
    classes = None
    if kind.classifies:
        assert columns.label is not None
        classes = find_classes(splits, columns.label, tokens=kind.labels_tokens)
        if not recipe.models.teacher_epochs and has_head(config, kind):
            classes = as_by_teacher(classes, own_names(config), config.num_labels, options.class_names)
    counts = f"{len(splits.train):,} to train on, {len(splits.test):,} of {splits.test_name} for the table"
    if splits.validation is not splits.test:
        counts += f", {len(splits.validation):,} to evaluate on while training"
    voice("data", f"{options.dataset}: {counts}")
    about = f"{kind.name}: {columns}" + (f", {classes}" if classes is not None else "")
    voice("", about + (f"; {dropped:,} rows without an input or a label were left out" if dropped else ""))
    return Rows(kind, columns, classes, splits)


def prepare(recipe: Recipe, args: SemCKDConfig, folder: RunFolder, rows: Rows, voice: Voice) -> Prepared:
    """Load or fine-tune the teacher, load or make the student, and make its samples."""
    sources, kind = recipe.models.teacher or [], rows.kind
    processor = load_processor(sources[0], kind)
    if recipe.models.teacher_epochs:
        teachers = [_fine_tuned(recipe, args, folder, rows, processor, voice)]
    else:
        teachers = [load_teacher(source, kind) for source in sources]
    for source, teacher in zip(sources, teachers, strict=True):
        voice("teacher", f"{source}: {type(teacher).__name__}, {count_parameters(teacher):,} parameters")
    student, own = _student(recipe, args, folder, rows, teachers, processor, voice)
    for model in (*teachers, student):
        _share_padding(model, own if model is student else processor)
    length = longest_input(kind, recipe.data.max_length, [own, processor], [student, *teachers])
    with args.main_process_first(desc="preparing the data"):
        samples = make_samples(rows.task(recipe.data, length), rows.splits, student, own, processor)
    return Prepared(rows, teachers, student, samples)


def _fine_tuned(
    recipe: Recipe, args: SemCKDConfig, folder: RunFolder, rows: Rows, processor: Any, voice: Voice
) -> nn.Module:
    """Return the teacher after its own training, or as an earlier run has left it."""
    done = folder.ready(TEACHER)
    if done is not None:
        return load_teacher(done, rows.kind)
    options = recipe.models
    assert options.teacher is not None
    model = new_model(options.teacher[0], "teacher", rows.kind, head_of(None, rows.classes))
    _share_padding(model, processor)
    length = longest_input(rows.kind, recipe.data.max_length, [processor], [model])
    with args.main_process_first(desc="preparing the data"):
        samples = make_samples(rows.task(recipe.data, length), rows.splits, model, processor, processor)
    place = folder.path / TEACHER
    changes = {
        "output_dir": str(place),
        "num_train_epochs": options.teacher_epochs,
        "learning_rate": options.teacher_learning_rate,
        "max_steps": -1,
        "logit_weight": 0.0,
        "feature_weight": 0.0,
        "task_weight": 1.0,
        "push_to_hub": False,
        "report_to": [],
        "gradient_checkpointing": args.gradient_checkpointing,
    }
    trainer = make_trainer(DistillationTrainer, model, replace(args, **changes), rows, samples)
    use_progress(trainer, "teacher", voice)
    trainer.train(resume_from_checkpoint=RunFolder(str(place)).newest_checkpoint())
    trainer.save_model(str(place))
    if args.should_save:
        for path in place.glob("checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)
        folder.mark_ready(TEACHER)
    return load_teacher(str(place), rows.kind)


def _student(
    recipe: Recipe,
    args: SemCKDConfig,
    folder: RunFolder,
    rows: Rows,
    teachers: list[nn.Module],
    processor: Any,
    voice: Voice,
) -> tuple[nn.Module, Any]:
    """Return the student that training starts from, and its processor."""
    options = recipe.models
    if options.student is not None:
        student = new_model(options.student, "student", rows.kind, head_of(teachers[0], rows.classes))
        voice("student", f"{options.student}: {type(student).__name__}, {count_parameters(student):,} parameters")
        return student, _own_processor(options.student, rows.kind, processor)
    with args.main_process_first(desc="cutting the student"):
        # Of all processes one decides: latencies differ. A run that is continued starts from the same student.
        done = folder.ready(START)
        if done is None and args.process_index == 0:
            batch = _calibration(recipe, rows, teachers[0], processor) if needs_batch(options) else None
            cut_student(teachers[0], options, batch).save_pretrained(folder.path / START)
            folder.mark_ready(START)
    student = new_model(str(folder.path / START), "student", rows.kind, {})
    share = count_parameters(student) / count_parameters(teachers[0])
    voice("student", f"cut out of the teacher, {count_parameters(student):,} parameters ({share:.0%})")
    return student, processor


def _calibration(recipe: Recipe, rows: Rows, teacher: nn.Module, processor: Any) -> Mapping[str, Any]:
    """Return a batch of the teacher's samples for the size of the student."""
    options = recipe.models
    count = options.calibration_samples or (1 if options.latency_ms is not None else CALIBRATION_SAMPLES)
    length = longest_input(rows.kind, recipe.data.max_length, [processor], [teacher])
    few = rows.splits.train.select(range(min(count, len(rows.splits.train))))
    task = rows.task(recipe.data, length)
    made = task.encode(processor, few[:])
    names = list(made)
    samples = [dict(zip(names, cells, strict=True)) for cells in zip(*made.values(), strict=True)]
    return collate(task.collator(processor, teacher), samples[:count])


def make_trainer(
    kind: Any, student: nn.Module, args: SemCKDConfig, rows: Rows, samples: Samples, **parts: Any
) -> DistillationTrainer:
    """Return a trainer for these samples; `parts` are the teacher and the method."""
    changes: dict[str, Any] = {}
    if rows.kind.lazy:
        changes["remove_unused_columns"] = False  # what a transform makes is all needed
    scores = training_metrics(rows.kind, rows.classes)
    if not scores:
        changes["prediction_loss_only"] = True  # the logits of a vocabulary would fill the memory
    evaluated: Dataset | None = samples.splits.validation if str(args.eval_strategy.value) != "no" else None
    return kind(
        model=student,
        args=replace(args, **changes),
        train_dataset=samples.splits.train,
        eval_dataset=evaluated,
        data_collator=samples.collator,
        processing_class=samples.processor,
        **scores,
        **parts,
    )


def _own_processor(source: str, kind: type[Task], teachers: Any) -> Any:
    """Return the student's processor; a new model without one reads what the teacher reads."""
    try:
        return load_processor(source, kind)
    except InputError:
        return teachers


def _share_padding(model: Any, processor: Any) -> None:
    """Tell a model which token pads, where it does not know: GPT-like classifiers look for the last other one."""
    if getattr(model.config, "pad_token_id", None) is None and hasattr(processor, "pad_token_id"):
        model.config.pad_token_id = processor.pad_token_id
