"""Everything between the rows of a recipe and the training of its student: teachers, the student, samples."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..config import SemCKDConfig
from ..data.batches import collate
from ..data.views import preserved_random_state
from ..errors import ConfigurationError, InputError
from ..models.sizes import count_parameters
from ..models.tasks import class_names
from ..teacher.placement import is_whole
from ..training.interrupts import saved_when_terminated
from ..training.whole_weights import whole_loading
from .data import make_samples
from .folder import START, TEACHER, RunFolder
from .models import cut_student, has_head, head_of, load_teacher, needs_batch, new_model, read_config
from .processors import load_processor, longest_input, read_alike
from .progress import Voice, use_progress
from .rows import Rows
from .schema import Recipe
from .tasks.base import Task
from .training import Prepared, teacher_trainer

CALIBRATION_SAMPLES = 32


def prepare(
    recipe: Recipe, args: SemCKDConfig, folder: RunFolder, rows: Rows, voice: Voice, *, trial: bool = False
) -> Prepared:
    """Load or fine-tune the teacher, load or make the student, and make its samples.

    In a `trial` a teacher that is to be fine-tuned stays as it is.
    """
    sources, kind = recipe.models.teacher or [], rows.kind
    processor = load_processor(sources[0], kind)
    if recipe.models.teacher_epochs:
        teachers = [_own_teacher(recipe, args, folder, rows, processor, voice, trial=trial)]
    else:
        teachers = [load_teacher(source, kind) for source in sources]
        _check_read_alike(processor, sources, kind)
    for source, teacher in zip(sources, teachers, strict=True):
        voice("teacher", f"{source}: {type(teacher).__name__}, {count_parameters(teacher):,} parameters")
    # Not from where other random numbers have led: a run that is repeated has not drawn those before.
    with preserved_random_state(args.seed):
        student, own = _student(recipe, args, folder, rows, teachers, processor, voice)
    for model in (*teachers, student):
        _share_padding(model, own if model is student else processor)
    length = longest_input(kind, recipe.data.max_length, [own, processor], [student, *teachers])
    with args.main_process_first(desc="preparing the data"):
        samples = make_samples(rows.task(recipe.data, length), rows.splits, student, own, processor)
    return Prepared(rows, teachers, student, samples)


def whole_teachers(
    recipe: Recipe, args: SemCKDConfig, folder: RunFolder, kind: type[Task], teachers: Sequence[Any]
) -> list[nn.Module]:
    """Return the teachers with all their weights in this process: one that training has spread is loaded anew.

    What runs them alone must not wait for other processes.
    """
    own = folder.ready(TEACHER) if recipe.models.teacher_epochs else None
    sources = [own] if own is not None else recipe.models.teacher or []
    found = []
    for source, teacher in zip(sources, teachers, strict=True):
        if not is_whole(teacher):
            padding = getattr(teacher.config, "pad_token_id", None)
            with whole_loading(args):
                teacher = load_teacher(source, kind)
            teacher.config.pad_token_id = padding
        found.append(teacher)
    return found


def whole_student(args: SemCKDConfig, folder: RunFolder, kind: type[Task], student: nn.Module) -> nn.Module:
    """Return a trained student with all its weights in this process: as it was saved, where an engine divides it."""
    if is_whole(student):
        return student
    with whole_loading(args):
        return new_model(str(folder.path), "student", kind, {})


def _check_read_alike(processor: Any, sources: list[str], kind: type[Task]) -> None:
    """Refuse several teachers that read a sample differently: all get what the first one's processor makes of it."""
    for source in sources[1:]:
        if not read_alike(processor, load_processor(source, kind)):
            raise InputError(
                "The teachers read their inputs differently",
                received=f"{source} and {sources[0]}, with two processors",
                expected="teachers with one tokenizer, image processor or feature extractor",
                todo="leave one of them out",
            )


def _own_teacher(
    recipe: Recipe, args: SemCKDConfig, folder: RunFolder, rows: Rows, processor: Any, voice: Voice, *, trial: bool
) -> nn.Module:
    """Return the teacher after its own training, or as an earlier run has left it."""
    done = folder.ready(TEACHER)
    if done is not None:
        return load_teacher(done, rows.kind)
    options = recipe.models
    assert options.teacher is not None
    with preserved_random_state(args.seed):
        model = new_model(options.teacher[0], "teacher", rows.kind, head_of(None, rows.classes))
    if trial:
        return model
    _share_padding(model, processor)
    length = longest_input(rows.kind, recipe.data.max_length, [processor], [model])
    with args.main_process_first(desc="preparing the data"):
        samples = make_samples(rows.task(recipe.data, length), rows.splits, model, processor, processor)
    place = folder.path / TEACHER
    rate, epochs = options.teacher_learning_rate, options.teacher_epochs
    own: dict[str, Any] = {"output_dir": str(place), "num_train_epochs": epochs, "learning_rate": rate}
    own |= {"max_steps": -1, "push_to_hub": False, "report_to": []}
    trainer = teacher_trainer(replace(args, **own), model, rows, samples)
    use_progress(trainer, "teacher", voice)
    checkpoint = RunFolder(str(place)).newest_checkpoint()
    if checkpoint is not None:
        voice("teacher", f"goes on from {Path(checkpoint).name}")
    with saved_when_terminated(trainer):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(place))
    if args.should_save:
        for path in place.glob("checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)
        folder.mark_ready(TEACHER)
    trainer.accelerator.wait_for_everyone()
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
    if folder.trained:
        student = new_model(str(folder.path), "student", rows.kind, {})
        voice("student", f"{count_parameters(student):,} parameters, trained by an earlier run")
        return student, _own_processor(str(folder.path), rows.kind, processor)
    if options.student is not None:
        _check_order(options.student, rows)
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
    # Its classes are named by the data where the teacher's are not.
    student = new_model(str(folder.path / START), "student", rows.kind, head_of(teachers[0], rows.classes))
    share = count_parameters(student) / count_parameters(teachers[0])
    voice("student", f"cut out of the teacher, {count_parameters(student):,} parameters ({share:.0%})")
    return student, processor


def _check_order(source: str, rows: Rows) -> None:
    """Refuse a student that was fine-tuned for the same classes in another order: its head would say others."""
    config = read_config(source, "student")
    names = class_names(config) if has_head(config, rows.kind) else None
    wanted = [] if rows.classes is None else [name.lower() for name in rows.classes.names]
    own = [name.lower() for name in names or wanted]
    if own != wanted and sorted(own) == sorted(wanted):
        raise ConfigurationError(
            "The student was fine-tuned for the same classes in another order",
            received=f"{', '.join(names or ())}; the teacher's are {', '.join(wanted)}",
            expected="the teacher's order, or a student that has not learned these classes",
            todo="start from the model that it was fine-tuned from",
        )


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
