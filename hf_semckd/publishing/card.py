"""The README of a distilled student: how to load it, how good it is, how it was made and which papers to cite."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .facts import StudentFacts
from .redaction import is_dataset_id, is_hub_id, is_model_id, is_plain_text, repository_name, shown_setting
from .usage import loading_code


def create_model_card(facts: StudentFacts) -> str:
    """Return the model card of a student as Markdown: a YAML block for the Hub, then a short text for people.

    Every value is checked against the allow-lists of `redaction`: what is off them is called local, shown as
    "(not shown)" or left out.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["decimal"] = format_decimal
    content = environment.get_template("card.md.jinja").render(_context(facts))
    # ModelCard parses the metadata again: what the Hub's client cannot read fails here.
    return str(ModelCard(content))


def format_decimal(value: float) -> str:
    """Return a float with the digits that matter at its size, the same number of decimals for comparable values."""
    if abs(value) >= 1000:
        return f"{value:,.1f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def _context(facts: StudentFacts) -> dict[str, Any]:
    """Return the template's values, all of them fit to be published."""
    repo = repository_name(facts.repo_name)
    results = {name: value for name, value in facts.results.items() if is_plain_text(name)}
    teachers = [facts.teacher] if isinstance(facts.teacher, str) else facts.teacher or ()
    return {
        "metadata": _metadata(facts, repo, results).to_yaml(),
        "repo": repo,
        "usage": loading_code(repo, facts.student_class, facts.processor),
        "parameters": facts.parameters,
        "base_model": _model_link(facts.base_model),
        "teacher": " and ".join(filter(None, map(_model_link, teachers))),
        "teacher_parameters": facts.teacher_parameters,
        "dataset": _dataset_link(facts.dataset),
        "method": _kept(facts.method),
        "is_semckd": _is_semckd(facts.method),
        "results": results,
        "settings": {
            name: shown_setting(name, value) for name, value in facts.settings.items() if is_plain_text(name)
        },
    }


def _metadata(facts: StudentFacts, repo: str, results: Mapping[str, float]) -> ModelCardData:
    """Return the YAML block's content; unknown entries are left out, not guessed."""
    dataset = _kept(facts.dataset, is_dataset_id)
    metrics = [name for name in results if name != "loss"]  # the Hub knows no metric of that name
    task = _kept(facts.pipeline_tag)
    rounded = {name: float(f"{results[name]:.6g}") for name in metrics if math.isfinite(results[name])}
    evaluations = [
        EvalResult(task_type=task, dataset_type=dataset, dataset_name=dataset, metric_type=name, metric_value=value)
        for name, value in rounded.items()
        if task and dataset
    ]
    own = ["knowledge-distillation", *(["semckd"] if _is_semckd(facts.method) else []), "generated_from_trainer"]
    return ModelCardData(
        base_model=_kept(facts.base_model, is_model_id),
        datasets=[dataset] if dataset else None,
        eval_results=evaluations or None,
        language=_plain_items(facts.language) or None,
        library_name="transformers",
        license=_kept(facts.license),
        metrics=metrics or None,
        model_name=repo if evaluations else None,
        pipeline_tag=task,
        tags=[*own, *_plain_items(facts.tags)],
    )


def _is_semckd(method: str) -> bool:
    return "semckd" in method.lower().split(" + ")


def _kept(text: str | None, allowed: Callable[[str], bool] = is_plain_text) -> str | None:
    return text if text and allowed(text) else None


def _plain_items(value: str | Sequence[str] | None) -> list[str]:
    return list(filter(is_plain_text, [value] if isinstance(value, str) else value or ()))


def _model_link(name: str | None) -> str | None:
    """Return a model's name as Markdown, linked where it has a user and so a page."""
    if not name:
        return None
    if not is_hub_id(name):
        return "a local model"
    return f"[{name}](https://huggingface.co/{name})" if "/" in name else f"`{name}`"


def _dataset_link(name: str | None) -> str | None:
    """Return a data set's name as Markdown: a link, or a description in words."""
    if not name:
        return None
    if is_dataset_id(name):
        return f"[{name}](https://huggingface.co/datasets/{name})"
    # One word that is not an id, such as "train.csv", may be a file or a folder.
    described = is_hub_id(name) or (is_plain_text(name) and " " in name and not os.path.exists(name))
    return name if described else "a local data set"
