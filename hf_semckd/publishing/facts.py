"""The facts of a student that its model card states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from torch import nn
from transformers import BaseImageProcessor, FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin

from ..errors import InputError
from .redaction import is_hub_id

# Heads for which the Hub has a pipeline, by the end of the class name.
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

# Trainer.evaluate returns these beside the metrics.
_BOOKKEEPING = frozenset(
    {"runtime", "samples_per_second", "steps_per_second", "epoch", "step", "model_preparation_time"}
)


@dataclass(frozen=True)
class CardOptions:
    """What only the user can tell about a student: the arguments of `Trainer.create_model_card`, None where unknown.

    Attributes:
        language: ISO 639 code or codes.
        license: The Hub's name of the license.
        tags: Further tags.
        model_name: Title of the card, in place of the repository's id.
        finetuned_from: What the student was initialized from, in place of what its configuration remembers.
        tasks: Not used; the student's class tells its task.
        dataset_tags: Hub id of the data set; the first one counts.
        dataset: Used without `dataset_tags`; also a description in words.
        dataset_args: Not used.
    """

    language: str | Sequence[str] | None = None
    license: str | None = None
    tags: str | Sequence[str] | None = None
    model_name: str | None = None
    finetuned_from: str | None = None
    tasks: str | Sequence[str] | None = None
    dataset_tags: str | Sequence[str] | None = None
    dataset: str | Sequence[str] | None = None
    dataset_args: str | Sequence[str] | None = None


@dataclass(frozen=True)
class StudentFacts:
    """A student, its teacher and its training, before redaction.

    Attributes:
        repo_name: Hub id under which the student is loaded ("user/name"), or its folder.
        student_class: The auto class that loads it.
        parameters: Number of the student's parameters, >= 1.
        pipeline_tag: The Hub's name of the task.
        processor: The auto class of the processor saved beside the student.
        base_model: Hub id or class name of the model that the student was initialized from; None: from scratch.
        teacher: Hub id or class name.
        teacher_parameters: Number of the teacher's parameters, >= 1.
        dataset: Hub id, or a description in words.
        method: Name of the feature loss, or of several joined by " + ".
        settings: Distillation settings in the order in which they are shown.
        metrics: Evaluation metrics, their names with or without "eval_"; run times among them are left out.
        license, language, tags: As in `CardOptions`.

    Raises:
        InputError: When a class is not a Python name, a number of parameters is below 1, or a metric not a number.
    """

    repo_name: str
    student_class: str
    parameters: int
    pipeline_tag: str | None = None
    processor: str | None = None
    base_model: str | None = None
    teacher: str | None = None
    teacher_parameters: int | None = None
    dataset: str | None = None
    method: str = "SemCKD"
    settings: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    license: str | None = None
    language: Sequence[str] = ()
    tags: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("student_class", "processor"):
            value = getattr(self, name)
            if value is not None and not value.isidentifier():
                raise _invalid(name, repr(value), "an auto class, such as 'AutoModelForImageClassification'")
        for name in ("parameters", "teacher_parameters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise _invalid(name, value, "a number of parameters >= 1")
        for name, value in self.metrics.items():
            if not isinstance(value, Real) or isinstance(value, bool):
                raise _invalid(f"metrics[{name!r}]", type(value).__name__, "an int or a float")

    @property
    def results(self) -> dict[str, float]:
        """The metrics that tell the student's quality, as Python floats."""
        named = {name.removeprefix("eval_"): float(value) for name, value in self.metrics.items()}
        return {name: value for name, value in named.items() if name not in _BOOKKEEPING}


def student_facts(
    repo_name: str,
    options: CardOptions,
    *,
    student: nn.Module,
    teacher: nn.Module | None,
    processing_class: Any,
    method: str,
    settings: Mapping[str, object],
    metrics: Mapping[str, float],
) -> StudentFacts:
    """Return the facts of a student, as far as its models and the user know them.

    Args:
        repo_name: See `StudentFacts`, like `method`, `settings` and `metrics`.
        options: What the user told.
        student: The plain student.
        teacher: The teacher, loaded or on the meta device; None without distillation.
        processing_class: The processor saved beside the student, or None.
    """
    student_class, pipeline_tag = auto_class(student)
    return StudentFacts(
        repo_name=repo_name,
        student_class=student_class,
        parameters=count_parameters(student),
        pipeline_tag=pipeline_tag,
        processor=next((name for kind, name in PROCESSORS if isinstance(processing_class, kind)), None),
        base_model=options.finetuned_from or hub_source(student),
        teacher=None if teacher is None else hub_source(teacher) or type(teacher).__name__,
        teacher_parameters=None if teacher is None else count_parameters(teacher),
        dataset=next(iter(_listed(options.dataset_tags) or _listed(options.dataset)), None),
        method=method,
        settings=settings,
        metrics=metrics,
        license=options.license,
        language=_listed(options.language),
        tags=_listed(options.tags),
    )


def last_evaluation(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the numbers of the last evaluation in a trainer's log, by their names with "eval_"."""
    for row in reversed(log_history):
        found = {name: value for name, value in row.items() if name.startswith("eval_")}
        if found:
            return {name: float(value) for name, value in found.items() if isinstance(value, Real)}
    return {}


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


def hub_source(model: nn.Module) -> str | None:
    """Return the Hub id that a model was loaded from; None for a folder or a new model."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if name and is_hub_id(name) else None


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _invalid(name: str, received: object, expected: str) -> InputError:
    return InputError(
        f"The model card cannot state {name}", received=received, expected=expected, todo=f"correct {name}"
    )
