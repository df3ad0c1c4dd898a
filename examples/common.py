"""Run the four rows that both examples show (teacher, student alone, with KD, with SemCKD) and report them."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import (
    AutoConfig,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    set_seed,
)
from transformers.utils import logging

from hf_semckd import DistillationTrainer, SemCKDConfig, SemCKDTrainer
from hf_semckd.files import write_json
from hf_semckd.publishing.environment import environment
from hf_semckd.publishing.tables import ModelRow, format_table

# Terms that are switched off for a row; the rows differ in nothing else.
NO_TEACHER = {"logit_weight": 0.0, "feature_weight": 0.0}
NO_FEATURES = {"feature_weight": 0.0}
# The subset stays the same whatever --seed is, so that runs with different seeds can be compared.
SUBSET_SEED = 0
WRITTEN = ("student", "teacher", "report.json", "association.png")
RECORDED = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "bf16",
    "fp16",
)


@dataclass
class ComparisonArguments:
    """What both examples take besides the fields of `SemCKDConfig`."""

    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher, a Hub name or a folder. None: the example's own."}
    )
    student_name_or_path: str | None = field(
        default=None, metadata={"help": "Student to start from, a Hub name or a folder. None: a small new one."}
    )
    teacher_epochs: float | None = field(
        default=None,
        metadata={"help": "Epochs of teacher training. None: 0 for a teacher that already knows these classes."},
    )
    teacher_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the teacher. None: the example's own."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train teacher and students on this many samples at most."}
    )
    student_train_samples: int | None = field(
        default=None,
        metadata={"help": "Train the students on this many of them. None: the example's own on its data, else all."},
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many samples at most."})
    eval_split: str = field(
        default="test", metadata={"help": "Split that the table shows. Choose settings on 'validation'."}
    )


@dataclass
class Comparison:
    """A teacher, a student and their data, ready to be compared."""

    data_name: str
    unit: str
    """What a sample is called: images, sentences."""
    teacher: PreTrainedModel
    teacher_processor: Any
    teacher_epochs: float
    teacher_learning_rate: float
    teacher_train: Any
    teacher_eval: Any
    student: PreTrainedModel
    student_processor: Any
    student_train: Any
    student_eval: Any
    cache_teacher: bool = False
    """Whether to keep the teacher's outputs while a row trains: it is much larger, and the samples do not vary."""


class QuietProgress(ProgressCallback):
    """A progress bar that names the row and shows the loss beside itself instead of printing a line for each log."""

    def __init__(self, label: str):
        super().__init__()
        self.label = label

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.label)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


def parse_arguments(kind: type, defaults: dict[str, Any]) -> tuple[Any, SemCKDConfig]:
    """Parse the command line into the example's own arguments and a `SemCKDConfig` with the example's defaults."""
    parser = HfArgumentParser((kind, SemCKDConfig))
    parser.set_defaults(
        report_to="none",
        logging_strategy="epoch",
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        **defaults,
    )
    options, args = parser.parse_args_into_dataclasses()
    logging.disable_progress_bar()  # of loading and writing files; training shows its own
    if args.process_index > 0:
        datasets.disable_progress_bars()
    return options, args


def run_example(kind: type, defaults: dict[str, Any], prepare: Callable[[Any, SemCKDConfig], Comparison]) -> None:
    """Parse the command line, load what it names, and compare; missing files end in a message, not a traceback."""
    options, args = parse_arguments(kind, defaults)
    try:
        job = prepare(options, args)
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from error
    compare(job, options, args)


def compare(job: Comparison, options: ComparisonArguments, args: SemCKDConfig) -> None:
    """Train the rows one after the other, from one student and with one seed, and write and print what came out."""
    out = Path(args.output_dir)
    say(
        args,
        f"{job.data_name}: the teacher learns from {len(job.teacher_train)} {job.unit}, the students from "
        f"{len(job.student_train)}; accuracy on {len(job.student_eval)} {options.eval_split} {job.unit}",
    )
    # A teacher that stays as it is gets no folder.
    teacher = _teacher_row(job, args, out / "teacher" if job.teacher_epochs > 0 else out)
    alone = _student_row(job, args, 2, "student alone", out / "student_alone", DistillationTrainer, **NO_TEACHER)[0]
    kd = _student_row(job, args, 3, "student + KD", out / "student_kd", DistillationTrainer, **NO_FEATURES)[0]
    # Its output_dir is the example's own: that is where the trainer puts the picture of the association.
    semckd, trainer = _student_row(
        job, args, 4, "student + SemCKD", out / "student", SemCKDTrainer, output_dir=str(out)
    )
    if args.process_index == 0:
        association = {
            "student_layers": trainer.student_layer_names,
            "teacher_layers": trainer.teacher_layer_names,
            "weights": trainer.association(),
        }
        rows = [teacher, alone, kd, semckd]
        _report(job, options, args, rows, association, trainer.distillation_settings())
    if args.push_to_hub:
        trainer.push_to_hub()


def _teacher_row(job: Comparison, args: SemCKDConfig, folder: Path) -> dict[str, Any]:
    """Train the teacher if it is to be trained, and evaluate it."""
    settings: dict[str, Any] = {"output_dir": str(folder), "learning_rate": job.teacher_learning_rate, **NO_TEACHER}
    if args.max_steps <= 0:
        settings["num_train_epochs"] = job.teacher_epochs
    trainer = Trainer(
        model=job.teacher,
        args=dataclasses.replace(args, push_to_hub=False, **settings),
        train_dataset=job.teacher_train,
        eval_dataset=job.teacher_eval,
        processing_class=job.teacher_processor,
        compute_metrics=accuracy,
    )
    row = _run(trainer, "teacher", 1, train=job.teacher_epochs > 0)
    if job.teacher_epochs > 0:
        trainer.save_model()
    return row


def _student_row(
    job: Comparison,
    args: SemCKDConfig,
    number: int,
    name: str,
    folder: Path,
    kind: type[DistillationTrainer],
    **settings: Any,
) -> tuple[dict[str, Any], DistillationTrainer]:
    """Train a copy of the untrained student and save it."""
    push = args.push_to_hub and kind is SemCKDTrainer
    settings = {"output_dir": str(folder), "push_to_hub": push, **settings}
    with tempfile.TemporaryDirectory() as cache:
        if job.cache_teacher and args.teacher_cache_dir is None:
            settings["teacher_cache_dir"] = cache
        return _train_student(job, args, number, name, folder, kind, settings)


def _train_student(
    job: Comparison,
    args: SemCKDConfig,
    number: int,
    name: str,
    folder: Path,
    kind: type[DistillationTrainer],
    settings: dict[str, Any],
) -> tuple[dict[str, Any], DistillationTrainer]:
    trainer = kind(
        model=copy.deepcopy(job.student),
        teacher_model=job.teacher,
        args=dataclasses.replace(args, **settings),
        train_dataset=job.student_train,
        eval_dataset=job.student_eval,
        processing_class=job.student_processor,
        compute_metrics=accuracy,
    )
    row = _run(trainer, name, number)
    trainer.save_model(str(folder))
    return row, trainer


def _run(trainer: Trainer, name: str, number: int, train: bool = True) -> dict[str, Any]:
    """Train (unless told not to) and evaluate; return the row with what the report holds besides."""
    args = trainer.args
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if not args.disable_tqdm:
        trainer.add_callback(QuietProgress(name))
    parameters = trainer.model.num_parameters()
    say(args, f"\n{number}/4 {name}: {parameters:,} parameters" + ("" if train else ", not trained here"))
    seconds = None
    if train:
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    metrics = trainer.evaluate()
    row = dataclasses.asdict(ModelRow(name, parameters, metrics["eval_accuracy"], seconds))
    return {**row, "eval_loss": metrics["eval_loss"], "steps": trainer.state.global_step}


def _report(
    job: Comparison,
    options: ComparisonArguments,
    args: SemCKDConfig,
    rows: list[dict[str, Any]],
    association: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    out = Path(args.output_dir)
    report = {
        "data": {
            "name": job.data_name,
            "teacher_train_samples": len(job.teacher_train),
            "student_train_samples": len(job.student_train),
            "eval_split": options.eval_split,
            "eval_samples": len(job.student_eval),
        },
        "seed": args.seed,
        "metric": "accuracy",
        "rows": rows,
        "association": association,
        "settings": {
            **settings,
            **{name: getattr(args, name) for name in RECORDED},
            "teacher_epochs": job.teacher_epochs,
            "teacher_learning_rate": job.teacher_learning_rate,
            "processes": args.world_size,
        },
        "environment": environment(),
    }
    write_json(out / "report.json", report)
    print(f"\n{job.data_name}, {len(job.student_eval)} {options.eval_split} {job.unit}, seed {args.seed}\n")
    print(format_table([_shown(row) for row in rows], ("model", "parameters", "accuracy", "seconds")))
    written = [path for path in WRITTEN if (out / path).exists()]
    auto = "AutoModelFor" + type(job.student).__name__.rpartition("For")[2]
    print(f"\nWritten to {out}: {', '.join(written)}. The student is a plain model:\n")
    print(f"    from transformers import {auto}")
    print(f'    model = {auto}.from_pretrained("{out / "student"}")')


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    seconds = None if row["seconds"] is None else round(row["seconds"])
    return {
        "model": row["name"],
        "parameters": row["parameters"],
        "accuracy": row["metric"],
        "seconds": seconds,
    }


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of samples whose largest logit is the label's."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def some_rows(dataset: Any, most: int | None) -> Any:
    """Return so many rows of a dataset at most, always the same ones in a random order; all of them for None."""
    if most is None or most >= len(dataset):
        return dataset
    return dataset.shuffle(seed=SUBSET_SEED).select(range(most))


def choose_split(data: Any, name: str) -> Any:
    """Return a split of a `DatasetDict`."""
    if name in data:
        return data[name]
    raise ValueError(f"Received eval_split={name!r}; expected one of {sorted(data)}. Set eval_split to one of these.")


def choose_epochs(options: ComparisonArguments, trained: bool, default: float) -> float:
    """Return the epochs of teacher training: as asked, or none for a teacher that knows the classes already."""
    if options.teacher_epochs is not None:
        return options.teacher_epochs
    return 0.0 if trained else default


def load_or_make(
    auto: Any, source: str | None, make: Callable[[], PreTrainedModel], names: list[str], seed: int
) -> tuple[PreTrainedModel, bool]:
    """Return a classifier for the label names, and whether it already knew that many classes when it was loaded.

    Args:
        auto: `AutoModelForImageClassification` or its like.
        source: Name or folder; None: make a new model.
        make: Makes a new model.
        names: Names of the classes.
        seed: Draws the new weights, so that they do not depend on what was made before.
    """
    set_seed(seed)
    if source is None:
        return make(), False
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a new head is expected, no reason for a warning
    try:
        model = auto.from_pretrained(source, num_labels=len(names), ignore_mismatched_sizes=True, **labels)
    finally:
        logging.set_verbosity(verbosity)
    return model, _classifies(auto, source, len(names))


def _classifies(auto: Any, source: str, classes: int) -> bool:
    """Whether the saved model has a head of this kind and size; if not, its head was drawn at random."""
    config = AutoConfig.from_pretrained(source)
    head = auto.__name__.removeprefix("AutoModel")
    return any(name.endswith(head) for name in config.architectures or []) and config.num_labels == classes


def say(args: SemCKDConfig, text: str) -> None:
    """Print on the main process alone."""
    if args.process_index == 0:
        print(text, flush=True)
