"""Loads a model by name or folder, or takes it as it is given."""

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig

from ..errors import InputError
from .quantized import Quantized

ModelSource = nn.Module | str | os.PathLike[str]
# What a tokenizer without words may know besides its special tokens.
FEW = 3
# One teacher or several.
TeacherSource = ModelSource | Sequence[ModelSource]


def load_model(
    source: ModelSource,
    role: str,
    like: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    quantized: Quantized | None = None,
) -> nn.Module:
    """Return a model as it is, or load it by name or folder, without running remote code.

    Refuses (`InputError`) what can be neither used nor loaded, or not be had in the precision `dtype` (None: as it was
    given or saved); a module of another precision is copied, so that it stays as it is. `like` is a model whose task
    head is wanted (the student, for a teacher); without it the configuration names the head. With `quantized` its
    matrices get so many bits, where they are not quantized already (`MissingDependencyError` without bitsandbytes).
    """
    if isinstance(source, nn.Module):
        if quantized is not None:
            return quantized.copy_of(source, role)
        return source if dtype is None else _in_precision(source, role, dtype)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"The {role} is not a model",
            received=type(source).__name__,
            expected="a PreTrainedModel, a PEFT model, any nn.Module, or a name or folder for from_pretrained",
            todo=f"pass the {role} itself, or where to load it from",
        )
    model, info = _read(source, role, like, dtype, quantized)
    if quantized is not None:
        quantized.check(model, role)
    # A student may get a new head, what is only used may not.
    if role != "student" and info["missing_keys"]:
        raise InputError(
            f"The {role} would have random weights: the checkpoint lacks some of its layers",
            received=f"{source!r} without {', '.join(sorted(map(str, info['missing_keys']))[:5])}",
            expected=f"a checkpoint that was fine-tuned as {type(model).__name__}",
            todo=f"fine-tune the {role} on the task first, or pass the model object if this is what you want",
        )
    return model


def _read(
    source: str | os.PathLike[str],
    role: str,
    like: nn.Module | None,
    dtype: torch.dtype | None,
    quantized: Quantized | None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return what `from_pretrained` makes of a name or folder, and what it says of it."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        kind = _model_class(config, like)
        how = (
            ({} if dtype is None else {"dtype": dtype})
            if quantized is None
            else quantized.settings(empty_model(source, like))
        )
        return kind.from_pretrained(source, trust_remote_code=False, output_loading_info=True, **how)
    except (OSError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"The {role} could not be loaded",
            received=f"{source!r} ({error})",
            expected="a Hub id or a folder with config.json and safetensors weights of a model with a task head",
            todo=f"check the name, the connection and that the files are whole, or pass a {role} that you loaded",
        ) from error


def has_words(tokenizer: Any) -> bool:
    """Whether a tokenizer knows words: without its files transformers makes one of special tokens alone."""
    return len(tokenizer) > len(tokenizer.all_special_ids) + FEW


def teacher_list(source: TeacherSource) -> list[ModelSource]:
    """Return one teacher, or several, as a list; `InputError` for an empty one."""
    if not isinstance(source, (list, tuple)):
        return [source]  # type: ignore[list-item]
    if source:
        return list(source)
    raise InputError(
        "There is no teacher to distill from",
        received=f"teacher_model={source!r}",
        expected="a model, a name or a folder, or a list of at least one of them",
        todo="put the teachers into the list",
    )


def empty_model(source: str | os.PathLike[str], like: nn.Module | None) -> nn.Module:
    """Return a model of a name or folder, with the task head of `like`, without memory for its weights."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    kind = _model_class(config, like)
    with torch.device("meta"):
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)


def _in_precision(model: nn.Module, role: str, dtype: torch.dtype) -> nn.Module:
    """Return the model in a precision: itself when it has it, else a copy."""
    if all(entry.dtype is dtype for entry in model.parameters() if entry.is_floating_point()):
        return model
    try:
        return copy.deepcopy(model).to(dtype)
    except (ValueError, RuntimeError, TypeError) as error:
        raise InputError(
            f"The {role} cannot be had in {dtype}",
            received=f"{type(model).__name__}, which said: {error}",
            expected="a model on one device that is neither quantized nor sharded",
            todo=f"set {role}_dtype='auto' and load the {role} in the precision that you want",
        ) from error


def _model_class(config: Any, like: nn.Module | None) -> Any:
    head = "" if like is None else type(like).__name__.rpartition("For")[2]
    names = list(getattr(config, "architectures", None) or [])
    for name in (f"AutoModelFor{head}", *names[:1]):
        if hasattr(transformers, name):
            return getattr(transformers, name)
    raise ValueError(f"the configuration names no known architecture: {names}")
