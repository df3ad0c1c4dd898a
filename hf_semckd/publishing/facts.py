"""What is told of a student: the facts that its model card states, and the versions it was made with."""

import contextlib
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError
from ..models.sizes import count_parameters
from .heads import class_names_of, head_of, processor_class
from .sources import Source, hub_source, source_of

# How a student is loaded: by transformers, as an adapter of PEFT, or from its weights by code of one's own.
LOADERS = ("transformers", "peft", "torch")
# The auto class that reads a file of a processor.
PROCESSOR_FILES = {
    "processor_config.json": "AutoProcessor",
    "preprocessor_config.json": "AutoProcessor",
    "tokenizer_config.json": "AutoTokenizer",
}
CPU_INFORMATION = Path("/proc/cpuinfo")
# Trainer.evaluate returns these beside the metrics.
BOOKKEEPING = {"runtime", "samples_per_second", "steps_per_second", "epoch", "step", "model_preparation_time"}


@dataclass(frozen=True)
class StudentFacts:
    """A student, its teachers and its training, before redaction; None or empty where unknown.

    Raises `InputError` when a class is not a Python name, a loader is not known, a number of parameters is below 1, or
    a metric not a number.

    Attributes:
        repo_name: Hub id under which the student is loaded ("user/name"), or its folder.
        student_class, processor: The auto classes that load the student and the processor saved beside it.
        parameters: Of the student; of an adapter (PEFT), of what is saved of it.
        loader: One of `LOADERS`.
        adapter_type: As PEFT calls it, such as "LORA".
        labels: Names of the classes, which an adapter does not keep.
        base_model, teacher: Hub id or class name; a list of several teachers.
        teacher_parameters: Of all teachers together.
        sources: The models that it was made from, for the license.
        dataset: Hub id, or a description in words.
        method: Name of the feature loss, or of several joined by " + ".
        settings, training, versions: As in `distillation_config.json`.
        metrics: Evaluation metrics, their names with or without "eval_"; run times among them are left out.
        evaluation: In the form of `evaluation.json`.
        files: Names of those beside the card that it may link to, of `PICTURES`.
    """

    repo_name: str
    student_class: str
    parameters: int
    pipeline_tag: str | None = None
    processor: str | None = None
    loader: str = "transformers"
    adapter_type: str | None = None
    labels: Sequence[str] = ()
    base_model: str | None = None
    teacher: str | Sequence[str] | None = None
    teacher_parameters: int | None = None
    sources: Sequence[Source] = ()
    dataset: str | None = None
    method: str = "SemCKD"
    settings: Mapping[str, object] = field(default_factory=dict)
    training: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    files: Sequence[str] = ()
    license: str | None = None
    language: str | Sequence[str] | None = None
    tags: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name, auto in {"student_class": self.student_class, "processor": self.processor}.items():
            if auto is not None and not auto.isidentifier():
                raise _invalid(name, repr(auto), "an auto class, such as 'AutoModelForImageClassification'")
        if self.loader not in LOADERS:
            raise _invalid("loader", repr(self.loader), " or ".join(map(repr, LOADERS)))
        for name, count in {"parameters": self.parameters, "teacher_parameters": self.teacher_parameters}.items():
            if count is not None and count < 1:
                raise _invalid(name, count, "a number of parameters >= 1")
        for name, value in self.metrics.items():
            if not isinstance(value, Real) or isinstance(value, bool):
                raise _invalid(f"metrics[{name!r}]", type(value).__name__, "an int or a float")

    @property
    def results(self) -> dict[str, float]:
        """The metrics that tell the student's quality, as Python floats."""
        named = {name.removeprefix("eval_"): float(value) for name, value in self.metrics.items()}
        return {name: value for name, value in named.items() if name not in BOOKKEEPING}


def model_facts(
    repo_name: str, student: nn.Module, teachers: Sequence[nn.Module], processing_class: Any, *, online: bool = False
) -> StudentFacts:
    """Return the facts that the models tell; teachers may be on the meta device. `online`: see `source_of`."""
    head, base = head_of(class_names_of(student)), hub_source(student)
    adapts, plain = hasattr(student, "peft_config"), not isinstance(student, PreTrainedModel)
    saved = [entry.numel() for entry in student.parameters() if entry.requires_grad] if adapts else []
    return StudentFacts(
        repo_name=repo_name,
        student_class=head.auto_class,
        parameters=sum(saved) or count_parameters(student),
        pipeline_tag=head.pipeline_tag,
        processor=processor_class(processing_class),
        loader="peft" if adapts else "torch" if plain else "transformers",
        adapter_type=_adapter_type(student),
        labels=labels_of_config(student.config) if adapts else (),
        base_model=base,
        teacher=[source_of(teacher).name for teacher in teachers],
        teacher_parameters=sum(map(count_parameters, teachers)) or None,
        sources=[source_of(model, online=online) for model in ([student] if base else []) + list(teachers)],
    )


def labels_of_config(config: Any) -> list[str]:
    """Return the names of a model's classes in order, or [] where it has none."""
    names = getattr(config, "id2label", None) or {}
    return [str(names[key]) for key in sorted(names)]


def _adapter_type(student: Any) -> str | None:
    found = next(iter(getattr(student, "peft_config", {}).values()), None)
    return None if found is None else str(getattr(found.peft_type, "value", found.peft_type))


def last_evaluation(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the numbers of the last evaluation in a trainer's log, by their names with "eval_"."""
    evaluations = [row for row in log_history if any(name.startswith("eval_") for name in row)]
    last = evaluations[-1] if evaluations else {}
    return {name: float(last[name]) for name in last if name.startswith("eval_") and isinstance(last[name], Real)}


def environment() -> dict[str, object]:
    """Return what a reader needs to judge a timing or repeat a run, and nothing that tells who ran it or where.

    Versions are None where a package is not installed, "accelerator" is None without a CUDA device.
    """
    versions: dict[str, str | None] = dict.fromkeys(("transformers", "accelerate", "hf_semckd"))
    for name in versions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **versions,
        # Not platform.platform(): a kernel's release may carry a name that its owner gave it.
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def processor() -> str:
    """Return the model of the CPU, or its architecture where that is not told."""
    if CPU_INFORMATION.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", CPU_INFORMATION.read_text(), flags=re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def _invalid(name: str, received: object, expected: str) -> InputError:
    return InputError(
        f"The model card cannot state {name}", received=received, expected=expected, todo=f"correct {name}"
    )
