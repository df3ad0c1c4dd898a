"""The values that settings may take."""

import os
import re
import sys
from typing import Any, Literal, get_args

from .errors import ConfigurationError, nearest

Association = Literal["similarity", "sinkhorn", "learned", "uniform", "last", "one_to_one"]
TargetNorm = Literal["channel", "none"]
Projector = Literal["shared", "convolutional", "pairwise"]
ProjectionInit = Literal["zero", "random"]
CacheDtype = Literal["auto", "float16", "bfloat16"]
TeacherDtype = Literal["auto", "float32", "bfloat16", "float16", "8bit", "4bit"]
TeacherPlacement = Literal["device", "device_map", "shard", "offload"]

POSITIVE = ("temperature", "association_temperature", "projection_learning_rate", "teacher_cache_limit_gb")
NOT_NEGATIVE = ("task_weight", "logit_weight", "feature_weight", "relation_weight")
LIMITS = {
    "max_tokens": ("tokens", "no limit"),
    "max_grid": ("rows and columns", "no limit"),
    "association_bank": ("samples", "the other samples of the micro-batch"),
    "logit_chunk_size": ("positions", "whole logits"),
    "teacher_cache_samples": ("draws", "whole logits"),
}
CHOICES = {
    "association": Association,
    "target_norm": TargetNorm,
    "projector": Projector,
    "projection_init": ProjectionInit,
    "teacher_dtype": TeacherDtype,
    "teacher_placement": TeacherPlacement,
    "teacher_cache_dtype": CacheDtype,
}


def check_projection_init(projector: Projector | None, projection_init: ProjectionInit | None) -> None:
    """Refuse published projections that start at zero, with a `ConfigurationError`."""
    if projection_init == "zero" and projector == "pairwise":
        raise ConfigurationError(
            "The pairwise projector cannot start at zero",
            received="projection_init='zero', projector='pairwise'",
            expected="linear projections, or the published start",
            todo="leave projection_init out, or use projector='shared'",
        )


def require_value(name: str, value: object, default: object) -> None:
    """Refuse a value that the setting of this name cannot take, with a `ConfigurationError`."""
    if name in POSITIVE or name in NOT_NEGATIVE:
        require_number(name, value, positive=name in POSITIVE)
    elif name in CHOICES:
        require_choice(name, value, get_args(CHOICES[name]))
    elif name in LIMITS:
        require_limit(name, value, *LIMITS[name], default)
    elif isinstance(default, bool):
        require_flag(name, value)


def require_number(name: str, value: object, *, positive: bool) -> None:
    """Refuse what is no finite number >= 0, or > 0 where `positive`."""
    # JSON has no other kind of number (a fraction, one of numpy), and nothing computes with a larger one.
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if 0 < value <= sys.float_info.max or (value == 0 and not positive):
            return
    expected = f"a finite number {'>' if positive else '>='} 0"
    raise ConfigurationError(
        f"`{name}` is out of range", received=repr(value), expected=expected, todo=f"set {name} to {expected}"
    )


def positive_list(name: str, values: Any) -> list[float] | None:
    """Return numbers, or one, as a list; refuse one that is not > 0."""
    if values is None:
        return None
    listed = list(values) if isinstance(values, (list, tuple)) else [values]
    for value in listed:
        require_number(name, value, positive=True)
    return listed


def require_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise ConfigurationError(
            f"`{name}` is neither on nor off",
            received=repr(value),
            expected="True or False",
            todo=f"set {name} to one of them",
        )


def require_limit(name: str, limit: object, unit: str, zero: str, default: object) -> None:
    """Refuse what is no whole number >= 0; `zero` says what 0 means."""
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
        raise ConfigurationError(
            f"`{name}` is not a number of {unit}",
            received=repr(limit),
            expected=f"a whole number >= 1, or 0 for {zero}",
            todo=f"set {name} to {default}, or to 0 for {zero}",
        )


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the choices, and name the nearest."""
    if not isinstance(value, str) or value not in choices:
        close = nearest(str(value), choices, count=1)
        raise ConfigurationError(
            f"`{name}` is not one of the known values",
            received=repr(value),
            expected=", ".join(map(repr, choices)),
            todo=f"did you mean {close[0]!r}?" if close else f"set {name} to one of these",
        )


def layer_list(name: str, layers: Any) -> list[Any] | None:
    """Return layers as all-int or all-str; digits from a command line become ints."""
    if layers is None:
        return None
    listed = list(layers) if isinstance(layers, (list, tuple)) else [layers]
    listed = [
        int(layer) if isinstance(layer, str) and re.fullmatch("-?[0-9]{1,9}", layer) else layer for layer in listed
    ]
    if {type(layer) for layer in listed} in ({int}, {str}) and len(set(listed)) == len(listed):
        return listed
    raise ConfigurationError(
        f"`{name}` is not a list of layers",
        received=repr(layers),
        expected="different hidden-state indices (ints), or different module names (strings), at least one; or None",
        todo=f"leave {name} out to use all blocks, or list either indices or names",
    )


def folder_name(name: str, value: Any) -> str:
    """Return the name of a folder, with the user's for `~`; refuse what cannot be one."""
    folder = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    named = isinstance(folder, str) and "\0" not in folder
    if isinstance(folder, str) and named and folder.strip():
        return os.path.expanduser(folder)
    raise ConfigurationError(
        f"`{name}` is {'empty' if named else 'no name of a folder'}",
        received=repr(value),
        expected="a folder that can be written, or None",
        todo="name a folder",
    )
