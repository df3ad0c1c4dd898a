"""What a recipe may say besides the fields of `SemCKDConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..config import option
from ..errors import ConfigurationError
from ..models.importance import Importance

TaskName = Literal[
    "text-classification",
    "token-classification",
    "question-answering",
    "text-generation",
    "text2text-generation",
    "image-classification",
    "audio-classification",
]


@dataclass
class ModelOptions:
    """The models: `teacher`, and a `student` that is given or cut out of the teacher."""

    # The title of its options in the help.
    _argument_group_name: ClassVar[str] = "models"

    teacher: list[str] | None = option(
        None, "Hub name or folder of the fine-tuned teacher; several learn to agree, see teacher_weights."
    )
    student: str | None = option(
        None,
        "Hub name or folder of the model to start from; a folder or file with a configuration alone is a new model. "
        "None: a smaller copy of the teacher, by num_layers, hidden_size, parameters or latency_ms. In a file, "
        "`student: {num_layers: 4}` says the same as `num_layers: 4`.",
    )
    num_layers: list[int] | None = option(None, "Blocks to keep of the teacher; two numbers for encoder and decoder.")
    hidden_size: int | None = option(None, "Channels to keep of the teacher.")
    parameters: float | None = option(None, "Largest share of the teacher's parameters, in (0, 1].")
    latency_ms: float | None = option(None, "Longest forward pass over calibration_samples samples, on this machine.")
    importance: Importance = option(
        "even", "Which blocks are kept: evenly spaced, or by how much they change their input or the loss."
    )
    init: Literal["teacher", "random"] = option("teacher", "Weights of a student that is cut out of the teacher.")
    calibration_samples: int | None = option(
        None, "Samples for latency_ms, importance and the choice of channels. None: 1 with latency_ms, 32 elsewhere."
    )
    teacher_epochs: float = option(
        0.0, "Fine-tune the teacher on the data first, for so many epochs; it is kept in output_dir/teacher."
    )
    teacher_learning_rate: float = option(5e-5, "Peak learning rate of that.")
    method: str = option(
        "semckd", "What is distilled: semckd, kd (logits alone), or another feature loss; several are joined by +."
    )


@dataclass
class DataOptions:
    """The data: where they come from, which columns are read, and how much of them."""

    # The title of its options in the help.
    _argument_group_name: ClassVar[str] = "data"

    dataset: str | None = option(
        None,
        "Hub name, a folder (of images or sounds by class, of csv, json or parquet files, or of save_to_disk), or a "
        "csv, tsv, json, jsonl, parquet or txt file.",
    )
    dataset_config: str | None = option(None, "Configuration of a Hub dataset, such as sst2 of nyu-mll/glue.")
    eval_dataset: str | None = option(None, "Another data set to evaluate on, given like dataset.")
    task: TaskName | None = option(
        None, "What is learned, by the Hub's names. None: what the teacher's head, or else the columns tell."
    )
    train_split: str = option("train", "Split to learn from.")
    eval_split: str | None = option(
        None,
        "Split to evaluate on while training. None: validation, else test, else a tenth of the training rows (2,000 "
        "at most), which are not trained on.",
    )
    test_split: str | None = option(
        None,
        "Split for the table at the end. None: eval_split where it is named; else test where it is labeled.",
    )
    input_columns: list[str] | None = option(
        None,
        "Columns that are read: one text or two, tokens, question and context, a source and its target, an image or "
        "a sound. None: found by type and name.",
    )
    label_column: str | None = option(None, "Column of the labels or answers. None: found by type and name.")
    class_names: list[str] | None = option(
        None, "The data's labels in the order of the teacher's classes, where the two are named differently."
    )
    regression: bool | None = option(
        None, "Whether labels are numbers to predict. None: where they are floats that are not whole."
    )
    prefix: str = option("", "Text in front of every input, such as 'summarize: ' for T5.")
    max_length: int | None = option(
        None,
        "Longest text in tokens, or sound in seconds. None: what the models take; 512 tokens at most, and 10 seconds.",
    )
    max_train_samples: int | None = option(None, "Train on so many rows, chosen at random, the same ones every time.")
    max_eval_samples: int | None = option(None, "Evaluate on so many rows at most.")


@dataclass
class ResultOptions:
    """What is made of the student: the table's metric, and files to deploy."""

    # The title of its options in the help.
    _argument_group_name: ClassVar[str] = "results"

    metric: str | None = option(None, "Quality in the table: accuracy, f1, ... None: the usual one of the task.")
    onnx: bool = option(False, "Also write the student as ONNX files, in float32 and int8, and measure them.")


PARTS = (ModelOptions, DataOptions, ResultOptions)
COUNTS = ("max_length", "max_train_samples", "max_eval_samples", "calibration_samples")
BUDGETS = ("num_layers", "hidden_size", "parameters", "latency_ms")


@dataclass(frozen=True)
class Recipe:
    """A teacher, a student, data and results; `head` are the comments at the top of its file."""

    models: ModelOptions
    data: DataOptions
    results: ResultOptions
    head: str = ""

    def check(self) -> None:
        """Raise `ConfigurationError` for what is missing, contradictory or out of range."""
        models, data = self.models, self.data
        for name in ("teacher", "dataset"):
            if not (getattr(models, name, None) or getattr(data, name, None)):
                raise _wrong(f"There is no {name}", f"no {name}", "a Hub name or a folder", f"add {name}: ...")
        given = [name for name in BUDGETS if getattr(models, name) is not None]
        if bool(given) == (models.student is not None):
            raise _wrong(
                "A student is either given, or cut out of the teacher",
                f"student={models.student!r}, and {', '.join(given) or 'no size'}",
                f"a name or folder, or one or more of {', '.join(BUDGETS)}",
                "keep one of them" if given else "add student: {num_layers: 4}, for example",
            )
        if given and len(models.teacher or ()) > 1:
            raise _wrong(
                "A student is cut out of one teacher",
                f"{len(models.teacher or ())} teachers, and {', '.join(given)}",
                "student: a name or folder",
                "cut it first: hf-semckd make-student",
            )
        if models.teacher_epochs and len(models.teacher or ()) > 1:
            raise _wrong(
                "Several teachers are fine-tuned before they are joined",
                f"teacher_epochs={models.teacher_epochs:g} for {len(models.teacher or ())} teachers",
                "one teacher, or teachers that are fine-tuned",
                "fine-tune each of them first",
            )
        if data.class_names is not None and models.teacher_epochs:
            raise _wrong(
                "The order of classes is that of a teacher that is fine-tuned",
                f"class_names, and teacher_epochs={models.teacher_epochs:g}",
                "class_names where the teacher knows its classes already",
                "leave one of them out",
            )
        numbers = {name: getattr(part, name) for part in (models, data) for name in COUNTS if hasattr(part, name)}
        wrong = [f"{name}={value}" for name, value in numbers.items() if value is not None and value < 1]
        wrong += [f"teacher_epochs={models.teacher_epochs:g}"] * (models.teacher_epochs < 0)
        if wrong:
            raise _wrong("A count is out of range", ", ".join(wrong), "numbers of at least 1", "correct it")


def _wrong(what: str, received: str, expected: str, todo: str) -> ConfigurationError:
    return ConfigurationError(what, received=received, expected=expected, todo=todo)
