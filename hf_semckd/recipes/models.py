"""The models of a recipe: a teacher with the head of the task, and a student that is given or cut out of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..errors import InputError, SemCKDError, SourceError
from ..models.loading import load_model
from ..models.students import make_student
from ..models.tasks import class_names
from .classes import Classes
from .schema import ModelOptions
from .tasks.base import Task

logger = logging.getLogger(__name__)
# Of models whose base model is no module of theirs (CLIP, Whisper).
HEADS = ("classifier", "projector", "score")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin")


def read_config(source: str, role: str) -> Any:
    """Return the configuration of a model by name, folder or file; `SourceError` where there is none."""
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"The {role} could not be loaded",
            received=f"{source} ({' '.join(str(error).split())[:300]})",
            expected="a Hub name, or a folder with config.json and safetensors weights",
            todo="check the name and the connection",
        ) from error


def has_head(config: Any, task: type[Task]) -> bool:
    """Whether a configuration is that of a model with the head of a task."""
    return any(name.endswith(task.heads) for name in getattr(config, "architectures", None) or ())


def load_teacher(source: str, task: type[Task]) -> Any:
    """Return a fine-tuned teacher; `InputError` for a model without the head of the task."""
    if not has_head(read_config(source, "teacher"), task):
        raise InputError(
            f"The teacher has not learned {task.name}",
            received=f"{source}, without a head for it",
            expected=f"a model that was fine-tuned as AutoModelFor{task.heads[0]}",
            todo="set teacher_epochs to fine-tune it on the data first, or name another teacher",
        )
    return load_model(source, "teacher")


def new_model(source: str, role: str, task: type[Task], head: Mapping[str, Any]) -> PreTrainedModel:
    """Return a model that will be trained: pretrained weights where there are any, and a head for these classes."""
    kind = getattr(transformers, f"AutoModelFor{task.heads[0]}")
    try:
        with _expecting_a_new_head():
            if _has_weights(source):
                model, info = kind.from_pretrained(
                    source,
                    trust_remote_code=False,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    dtype="float32",
                    **head,
                )
                _check_loaded(model, info, source, role)
                return model
            config = read_config(source, role)
            for name, value in head.items():
                setattr(config, name, value)
            return kind.from_config(config)
    except SemCKDError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"The {role} could not be loaded for {task.name}",
            received=f"{source} ({' '.join(str(error).split())[:300]})",
            expected=f"a model that AutoModelFor{task.heads[0]} takes",
            todo=f"name another {role}, or fetch its files again where they are not whole",
        ) from error


def cut_student(
    teacher: nn.Module, options: ModelOptions, batch: Mapping[str, Any] | None, *, report: bool = False
) -> PreTrainedModel:
    """Return the student that the sizes of a recipe ask for; `report` prints what was kept."""
    layers = options.num_layers
    return make_student(
        teacher,
        num_layers=layers[0] if layers is not None and len(layers) == 1 else layers,
        hidden_size=options.hidden_size,
        parameters=options.parameters,
        latency_ms=options.latency_ms,
        importance=options.importance,
        init=options.init,
        batch=batch,
        report=report,
    )


def needs_batch(options: ModelOptions) -> bool:
    """Whether the student's size or what it keeps depends on samples."""
    return options.latency_ms is not None or options.importance != "even" or options.hidden_size is not None


def head_of(teacher: nn.Module | None, classes: Classes | None) -> dict[str, Any]:
    """Return the settings of a student's head: the teacher's classes, or those of the data where it has no names."""
    if classes is None:
        return {}
    config: Any = None if teacher is None else teacher.config
    head = classes.head()
    if config is not None and classes.kind != "regression" and class_names(config) is not None:
        names = dict(config.id2label)  # a configuration may lack the other direction
        head |= {"id2label": names, "label2id": {name: place for place, name in names.items()}}
    return head


def _has_weights(source: str) -> bool:
    """Whether there are weights beside a configuration; what is not on this disk is on the Hub, with weights."""
    path = Path(source)
    if path.is_file():
        return False
    return not path.is_dir() or any(next(path.glob(pattern), None) for pattern in WEIGHTS)


def _check_loaded(model: PreTrainedModel, info: Mapping[str, Any], source: str, role: str) -> None:
    """Tell which weights below the head the checkpoint does not have; `InputError` where it has none of them.

    Where no module is the base model, the head is what is usually called so. A language model's output layer is none.
    """
    new = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    weights = dict(model.named_parameters())
    below = [name for name in weights if name.startswith(f"{model.base_model_prefix}.")]
    below = below or [name for name in weights if name.partition(".")[0] not in HEADS]
    outputs = model.get_output_embeddings()
    words = [name for name, weight in weights.items() if outputs is not None and weight is outputs.weight]
    missing = [name for name in dict.fromkeys([*below, *words]) if name in new]
    if not missing:
        return
    names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    if new.issuperset(below):
        raise InputError(
            f"The {role} has nothing of the checkpoint that it is loaded from",
            received=f"{source}, without {names}",
            expected=f"weights of {type(model).__name__}, under the names that it gives them",
            todo="name the folder that save_pretrained wrote, or leave the weights out to begin with new ones",
        )
    logger.warning("The %s begins with new weights where %s has none that fit: %s.", role, source, names)


@contextlib.contextmanager
def _expecting_a_new_head() -> Iterator[None]:
    """Keep transformers from warning of a new head, which it offers no other way for; `_check_loaded` tells the rest.

    https://github.com/huggingface/transformers/issues/6780
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
