"""The README of a distilled student: how to load it, how good it is, how it was made and whom to cite."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import InputError
from .tables import format_markdown_table

LOCAL_MODEL = "a local model"

LOCAL_DATA = "a local data set"

HIDDEN_PATH = "(local path)"

HIDDEN_SECRET = "(redacted)"

LONGEST_VALUE = 200

# What Trainer.evaluate returns beside the metrics.
_BOOKKEEPING = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")

# "runs/vit" is as good a Hub id as any, by its letters; under these first names it is far more often a folder.
_FOLDER_NAMES = frozenset(
    {"checkpoints", "data", "datasets", "local", "models", "out", "output", "outputs", "results", "runs", "tmp"}
)

_FILE_ENDING = re.compile(
    r"\.(arrow|bin|csv|gz|h5|json|jsonl|npy|npz|onnx|parquet|pkl|pt|pth|py|safetensors|tar|tsv|txt|ya?ml|zip)$", re.I
)

_PATH_IN_TEXT = re.compile(
    r"(?<![\w.:/<])(/|~[\w.-]*[/\\]|\.{1,2}[/\\])[^\s/]"  # /x, ~/x, ~name/x, ./x, ../x, but not </x>
    r"|:/(?!/)"  # name:/x and C:/x, but not https://
    r"|\w:?\\\w|\\\\\w"  # C:\x, x\y, \\server
    r"|\b(?!https?://)\w+://"  # file://, s3://
    r"|(?<![/\w.:-])[\w.-]+(/[\w.-]+){2,}"  # x/y/z
)

_SECRET = re.compile(
    r"(?<![A-Za-z0-9])((hf|api_org|gh[pousr]|github_pat)_|sk-(proj-|ant-)?)\w{20,}"  # tokens of the usual services
    r"|://[^/\s:@]+:[^/\s@]+@"  # https://user:password@
)

_SECRET_KEY = re.compile(r"(^|_)(token|password|secret|api_?key|credentials?)$", re.I)

_HINTON = """@misc{hinton2015distilling,
  title         = {Distilling the Knowledge in a Neural Network},
  author        = {Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  year          = {2015},
  eprint        = {1503.02531},
  archivePrefix = {arXiv}
}"""

_SEMCKD = """@inproceedings{chen2021semckd,
  title     = {Cross-Layer Distillation with Semantic Calibration},
  author    = {Chen, Defang and Mei, Jian-Ping and Zhang, Yuan and Wang, Can and Wang, Zhe and Feng, Yan
               and Chen, Chun},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  volume    = {35},
  number    = {8},
  pages     = {7028--7036},
  year      = {2021}
}

@article{wang2023semckd,
  title   = {{SemCKD}: Semantic Calibration for Cross-Layer Knowledge Distillation},
  author  = {Wang, Can and Chen, Defang and Mei, Jian-Ping and Zhang, Yuan and Feng, Yan and Chen, Chun},
  journal = {IEEE Transactions on Knowledge and Data Engineering},
  volume  = {35},
  number  = {6},
  year    = {2023},
  doi     = {10.1109/TKDE.2022.3171571}
}"""


def create_model_card(
    *,
    repo_name: str,
    student_class: str,
    pipeline_tag: str | None,
    base_model: str | None,
    teacher: str | None,
    dataset: str | None,
    metrics: Mapping[str, float],
    configuration: Mapping[str, object],
    parameters: int,
    teacher_parameters: int | None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    processor: str | None = None,
    tags: Sequence[str] = (),
    method: str = "SemCKD",
) -> str:
    """Return the model card of a student: valid metadata for the Hub, then a short text for people.

    No local path and no token gets into the card. Of a path only what is public is told: the last part of
    `repo_name`, "a local model" for the teacher and the base model, "a local data set", "(local path)" for a
    setting. A name counts as local if it is spelled like a path or is found on this machine's disk.

    Args:
        repo_name: Hub id under which the student will be loaded ("user/name"), or its folder.
        student_class: The auto class that loads it, such as "AutoModelForImageClassification".
        pipeline_tag: The Hub's name of the task, such as "image-classification"; None: unknown.
        base_model: What the student started from, a Hub id or class name; None: from scratch.
        teacher: What it learned from, a Hub id or class name; None: not told.
        dataset: Hub id of the data, or a description in words; None: not told.
        metrics: Evaluation results; a leading "eval_" and entries that are no quality (runtime, ...) are dropped.
        configuration: Distillation settings, shown in the given order.
        parameters: Number of parameters of the student, >= 1.
        teacher_parameters: Number of parameters of the teacher, >= 1; None: unknown.
        license: The Hub's name of the license; None: not told.
        language: ISO 639 code or codes; None: not told.
        processor: The auto class beside the model, "AutoImageProcessor" or "AutoTokenizer"; None: none.
        tags: Further tags.
        method: Name of the feature loss; with another than "SemCKD" the card neither claims nor cites SemCKD.

    Returns:
        Markdown that starts with a YAML block and ends with a newline.

    Raises:
        InputError: When a class is no Python name, a number of parameters is below 1, or a metric is no number.
    """
    _require_class("student_class", student_class)
    if processor is not None:
        _require_class("processor", processor)
    for name, count in (("parameters", parameters), ("teacher_parameters", teacher_parameters)):
        _require_count(name, count)
    repo = _repository(repo_name)
    results = _results(metrics)
    data = _metadata(repo, pipeline_tag, base_model, dataset, results, license, language, tags, method)
    body = [
        f"# {repo}",
        _summary(repo, base_model, teacher, dataset, parameters, teacher_parameters, method),
        _usage(repo, student_class, processor),
        _evaluation(results, dataset),
        _recipe(configuration),
        _citation(method),
    ]
    text = "\n\n".join(body)
    # ModelCard parses the block again, so that metadata the Hub's client could not read fails here.
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def looks_like_hub_id(name: str) -> bool:
    """Tell whether a name can be the id of a repository on the Hub and is no folder or file.

    Args:
        name: "user/name", a bare "name", or a path.

    Returns:
        False for paths, for names of files and usual output folders, for what exists on this machine's disk (from
        where transformers would load it), and for tokens; else whether the Hub would accept the name.
    """
    return _spelled_like_hub_id(name) and not os.path.exists(name)


def _spelled_like_hub_id(name: str) -> bool:
    if _spelled_like_path(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    # Older versions of the client let letters beyond ASCII pass, which the Hub does not.
    return name.isascii() and bool(name) and not _SECRET.search(name)


def _spelled_like_path(name: str) -> bool:
    """Tell whether a name of at most one slash is that of a usual output folder, a checkpoint or a file."""
    first, last = name.split("/")[0], name.rsplit("/", 1)[-1]
    usual = first.lower() in _FOLDER_NAMES or re.fullmatch(r"checkpoint-\d+", last) is not None
    return usual or _FILE_ENDING.search(last) is not None


def _is_base_model(name: str | None) -> bool:
    """Tell whether a name may stand in the metadata, where the Hub makes a link of it."""
    if not name or not looks_like_hub_id(name):
        return False
    # Ids without a user are spelled like "gpt2" or "bert-base-cased"; "ViTModel" is a class, "student" a folder.
    return "/" in name or (name == name.lower() and re.search(r"[-\d]", name) is not None)


def _is_hub_dataset(name: str | None) -> bool:
    """Tell whether a name may stand in the metadata; ids without a user are old and in lower case ("imdb")."""
    return name is not None and looks_like_hub_id(name) and ("/" in name or name == name.lower())


def _public(text: str) -> str:
    """Return text on one line without what must not leave this machine."""
    text = "".join(character for character in " ".join(text.split()) if character.isprintable())
    if _SECRET.search(text):
        return HIDDEN_SECRET
    if _PATH_IN_TEXT.search(text):
        return HIDDEN_PATH
    # One slash alone is no evidence of a path ("and/or", "user/name"): ask the names and the disk.
    words = (word for word in re.split(r"[\s,;=()\[\]{}\"'`]+", text) if "/" in word)
    return HIDDEN_PATH if any(_spelled_like_path(word) or os.path.exists(word) for word in words) else text


def _is_public(text: str) -> bool:
    return bool(text.strip()) and _public(text) not in (HIDDEN_PATH, HIDDEN_SECRET)


def _repository(repo_name: str) -> str:
    """Return the Hub id, or the last part of a path spelled as the Hub wants it."""
    # Whether it exists on this disk does not matter here: the folder of the run may well have the repository's name.
    if _spelled_like_hub_id(repo_name):
        return repo_name
    last = re.split(r"[/\\]", repo_name.rstrip("/\\"))[-1]
    slug = re.sub(r"[^A-Za-z0-9._]+|\.{2,}", "-", last).strip("-._")
    return slug if slug and not _SECRET.search(slug) else "student"


def _results(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the qualities among the metrics, as Python floats."""
    results = {}
    for key, value in metrics.items():
        name = key.removeprefix("eval_")
        if name in _BOOKKEEPING:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise InputError(
                f"The metric {key!r} is no number",
                received=type(value).__name__,
                expected="an int or a float",
                todo="leave it out of the card's metrics",
            )
        results[_public(name)] = float(value)
    return results


def _metadata(
    repo: str,
    pipeline_tag: str | None,
    base_model: str | None,
    dataset: str | None,
    results: Mapping[str, float],
    license: str | None,
    language: str | Sequence[str] | None,
    tags: Sequence[str],
    method: str,
) -> ModelCardData:
    """Return the YAML block's content; what is unknown is left out rather than guessed."""
    hub_dataset = dataset if _is_hub_dataset(dataset) else None
    task = pipeline_tag if pipeline_tag and _is_public(pipeline_tag) else None
    evaluations = []
    if hub_dataset and task:
        evaluations = [
            EvalResult(
                task_type=task,
                dataset_type=hub_dataset,
                dataset_name=hub_dataset,
                metric_type=name,
                metric_value=float(f"{value:.6g}"),
            )
            for name, value in results.items()
            # The Hub knows no metric called loss, and its index takes numbers, which a NaN is not.
            if name != "loss" and math.isfinite(value)
        ]
    own = ["knowledge-distillation", *(["semckd"] if _is_semckd(method) else []), "generated_from_trainer"]
    languages = [language] if isinstance(language, str) else list(language or ())
    return ModelCardData(
        base_model=base_model if _is_base_model(base_model) else None,
        datasets=[hub_dataset] if hub_dataset else None,
        eval_results=evaluations or None,
        language=[code for code in languages if _is_public(code)] or None,
        library_name="transformers",
        license=license if license and _is_public(license) else None,
        metrics=[name for name in results if name != "loss"] or None,
        model_name=repo if evaluations else None,
        pipeline_tag=task,
        tags=[*own, *(tag for tag in tags if _is_public(tag))],
    )


def _summary(
    repo: str,
    base_model: str | None,
    teacher: str | None,
    dataset: str | None,
    parameters: int,
    teacher_parameters: int | None,
    method: str,
) -> str:
    """Return the sentence that says what this model is."""
    sentence = f"`{repo}` is a student of {parameters:,} parameters"
    if base_model:
        sentence += f", started from {_model(base_model)}"
    sentence += f" and trained by knowledge distillation ({_inline(method, code=False)})"
    if teacher:
        sentence += f" from {_model(teacher)}"
    if teacher_parameters is not None:
        whose = "" if teacher else " from a teacher"
        ratio = teacher_parameters / parameters
        sentence += f"{whose} of {teacher_parameters:,} parameters ({ratio:.3g} times as many)"
    if dataset:
        sentence += f" on {_data(dataset)}"
    return sentence + "."


def _usage(repo: str, student_class: str, processor: str | None) -> str:
    """Return how to load the student with transformers only."""
    classes = sorted({student_class, *([processor] if processor else [])})
    code = [f"from transformers import {', '.join(classes)}", ""]
    if processor:
        variable = "tokenizer" if processor == "AutoTokenizer" else "processor"
        code.append(f'{variable} = {processor}.from_pretrained("{repo}")')
    code.append(f'model = {student_class}.from_pretrained("{repo}")')
    introduction = "With plain `transformers`; the library that trained it (`hf_semckd`) is not needed:"
    return "\n".join(["## How to load", "", introduction, "", "```python", *code, "```"])


def _evaluation(results: Mapping[str, float], dataset: str | None) -> str:
    """Return the table of results, or that there is none."""
    if not results:
        return "## Evaluation\n\nNo evaluation was run."
    rows = [{"metric": _inline(name), "value": value} for name, value in results.items()]
    where = f"On the evaluation part of {_data(dataset)}" if dataset else "On the evaluation data"
    return f"## Evaluation\n\n{where}:\n\n{format_markdown_table(rows, ['metric', 'value'])}"


def _recipe(configuration: Mapping[str, object]) -> str:
    """Return the table of distillation settings."""
    heading = "## How it was distilled"
    rows = [
        {"setting": _inline(str(key)), "value": _inline(HIDDEN_SECRET if _hides(key, value) else _plain(value))}
        for key, value in configuration.items()
    ]
    if not rows:
        return f"{heading}\n\nThe settings were not recorded."
    return f"{heading}\n\nWith `hf_semckd` and these settings:\n\n{format_markdown_table(rows, ['setting', 'value'])}"


def _citation(method: str) -> str:
    entries = [_SEMCKD, _HINTON] if _is_semckd(method) else [_HINTON]
    return "\n".join(["## Citation", "", "```bibtex", "\n\n".join(entries), "```"])


def _is_semckd(method: str) -> bool:
    return method.lower() == "semckd"


def _model(name: str) -> str:
    """Return a model's name as Markdown, linked where it has a user and so a page."""
    if not looks_like_hub_id(name):
        return LOCAL_MODEL
    return f"[{name}](https://huggingface.co/{name})" if "/" in name else f"`{name}`"


def _data(dataset: str) -> str:
    """Return a data set's name as Markdown: a link, a description in words, or that it is local."""
    if _is_hub_dataset(dataset):
        return f"[{dataset}](https://huggingface.co/datasets/{dataset})"
    # Words are a description, and so is a name such as "CIFAR-100"; anything else without a space is a file or folder.
    described = looks_like_hub_id(dataset) or (_is_public(dataset) and " " in dataset and not os.path.exists(dataset))
    return _inline(dataset, code=False) if described else LOCAL_DATA


def _hides(key: object, value: object) -> bool:
    """Tell whether a setting's name says that its value is a secret; numbers are none (`max_token`)."""
    return isinstance(value, str) and _SECRET_KEY.search(str(key)) is not None


def _plain(value: object) -> str:
    """Return a setting's value as text, lists and mappings item by item, so that each item is checked by itself."""
    if isinstance(value, PurePath):
        return HIDDEN_PATH
    if isinstance(value, str):
        return _public(value)
    if isinstance(value, (float, np.floating)):
        return f"{float(value):.6g}"
    if isinstance(value, Mapping):
        items = ((key, HIDDEN_SECRET if _hides(key, item) else _plain(item)) for key, item in value.items())
        return ", ".join(f"{_public(str(key))}={item}" for key, item in items)
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(_plain(item) for item in value)
    return _public(str(value))


def _inline(text: str, *, code: bool = True) -> str:
    """Return text for the inside of a line or table cell, where it cannot start or end any Markdown or HTML."""
    text = _public(text)
    if len(text) > LONGEST_VALUE:
        text = text[: LONGEST_VALUE - 1] + "…"
    if not text:
        return "(empty)"
    # A code span takes everything literally but a backtick and, inside a table, a pipe or a backslash before it.
    if code and not re.search(r"[`|\\]", text):
        return f"`{text}`"
    escaped = re.sub(r"([\\`*_\[\]#~!])", r"\\\1", text.replace("&", "&amp;"))
    return escaped.replace("<", "&lt;").replace(">", "&gt;")


def _require_class(name: str, value: str) -> None:
    if not value.isidentifier():
        raise InputError(
            f"{name} is no class of transformers",
            received=repr(_public(value)),
            expected='a name such as "AutoModelForImageClassification"',
            todo="pass the auto class that loads the saved folder",
        )


def _require_count(name: str, count: int | None) -> None:
    if count is not None and count < 1:
        raise InputError(
            f"{name} is no number of parameters",
            received=count,
            expected="an integer >= 1",
            todo="count with `sum(p.numel() for p in model.parameters())`",
        )
