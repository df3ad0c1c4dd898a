"""What a model card may show. Allow-lists: no pattern finds every path and every secret in free text."""

import os
import re
from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Literal, get_args, get_origin

import numpy as np
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from .. import choices

HIDDEN = "(not shown)"
# The only words that a setting may have as its value, apart from the layers' names.
CHOICES = frozenset(
    word for alias in vars(choices).values() if get_origin(alias) is Literal for word in get_args(alias)
) | {str(entry.value) for kind in (SchedulerType, OptimizerNames) for entry in kind}
LAYER_SETTINGS = frozenset({"student_layers", "teacher_layers"})
# No slash, backslash or control character, and nothing that Markdown or HTML treats as markup.
_PLAIN_TEXT = re.compile(r"[\w .,:%+()-]+")
_TOKEN = re.compile(r"(?<![A-Za-z0-9])((hf|api_org|gh[pousr]|github_pat)_\w{20,}|sk-[\w-]{20,})")
# "runs/vit" is spelled like a Hub id; under these first names it is far more often a folder.
_FOLDER_NAMES = frozenset(
    {"checkpoints", "data", "datasets", "local", "models", "out", "output", "outputs", "results", "runs", "tmp"}
)
_LOCAL_NAME = re.compile(
    r"checkpoint-\d+|"
    r".*\.(arrow|bin|csv|gz|h5|json|jsonl|npy|npz|onnx|parquet|pkl|pt|pth|py|safetensors|tar|tsv|txt|ya?ml|zip)",
    re.IGNORECASE,
)


def is_plain_text(text: str) -> bool:
    """Tell whether a text is made of words and simple punctuation and holds no access token."""
    return _PLAIN_TEXT.fullmatch(text) is not None and bool(text.strip()) and not _TOKEN.search(text)


def is_hub_id(name: str) -> bool:
    """Tell whether a name is the id of a Hub repository ("user/name" or "name").

    Names of files and of common output folders are not, nor what exists on this disk: transformers would load that.
    """
    return _spelled_like_hub_id(name) and not os.path.exists(name)


def is_model_id(name: str) -> bool:
    """Tell whether a Hub id can be that of a model: "gpt2" and "bert-base-cased", unlike "ViTModel" and "student"."""
    return is_hub_id(name) and ("/" in name or (name == name.lower() and re.search(r"[-\d]", name) is not None))


def is_dataset_id(name: str) -> bool:
    """Tell whether a Hub id can be that of a data set; those without a user are old and in lower case ("imdb")."""
    return is_hub_id(name) and ("/" in name or name == name.lower())


def repository_name(name: str) -> str:
    """Return a Hub id unchanged, and of a path its last part, spelled as the Hub accepts it."""
    # It may exist on this disk: the folder of the run often has the repository's name.
    if _spelled_like_hub_id(name):
        return name
    slug = re.sub(r"[^A-Za-z0-9._]+|\.{2,}", "-", PureWindowsPath(name).name).strip("-._")
    return slug if slug and not _TOKEN.search(slug) else "student"


def shown_setting(name: str, value: object) -> str:
    """Return a setting's value as text, item by item; `HIDDEN` unless it is a number, None, a choice or a layer."""
    if isinstance(value, (list, tuple)):
        return ", ".join(shown_setting(name, item) for item in value)
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items() if is_plain_text(str(key))]
        return ", ".join(f"{key}={shown_setting(key, item)}" for key, item in items)
    if value is None or isinstance(value, (bool, int, np.bool_, np.integer)):
        return str(value)
    if isinstance(value, (float, np.floating)):
        return f"{float(value):.6g}"
    if isinstance(value, str) and (value in CHOICES or (name in LAYER_SETTINGS and is_plain_text(value))):
        return value
    return HIDDEN


def _spelled_like_hub_id(name: str) -> bool:
    first, last = name.split("/")[0], name.rsplit("/", 1)[-1]
    if first.lower() in _FOLDER_NAMES or _LOCAL_NAME.fullmatch(last) or _TOKEN.search(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    # Old clients accept the empty name and letters beyond ASCII, which the Hub refuses.
    return bool(name) and name.isascii()
