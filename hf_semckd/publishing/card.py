"""The README of a distilled student: how good it is, how to load it, how it was made and which papers to cite."""

import functools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import InputError
from .deploy import CardTable, card_table
from .facts import StudentFacts
from .heads import EXAMPLES
from .redaction import is_dataset_id, is_hub_id, is_model_id, is_plain_text, repository_name
from .settings import distillation_rows, training_rows, version_rows
from .sources import LicenseTerms, combined_license
from .usage import loading_code
from .wording import LORA, dataset_link, summary

logger = logging.getLogger(__name__)
ASSOCIATION_PICTURE, EVALUATION_PICTURE, EVALUATION_FILE = "association.png", "evaluation.png", "evaluation.json"
CARD_FILES = (ASSOCIATION_PICTURE, EVALUATION_PICTURE, EVALUATION_FILE)
# What the Hub accepts: adapter, merge, quantized, finetune.
RELATIONS = {"peft": "adapter", "transformers": "finetune", "torch": "finetune"}
LIBRARIES = {"peft": "peft", "transformers": "transformers", "torch": None}
# More names would fill the page.
MOST_LABELS = 20


def create_model_card(facts: StudentFacts) -> str:
    """Return the model card of a student as Markdown: a YAML block for the Hub, then a short text for people.

    Every value is checked against the allow-lists of `redaction`: what is off them is called local, shown as
    "(not shown)" or left out.
    """
    content = _template().render(_context(facts))
    # ModelCard parses the metadata again: what the Hub's client cannot read fails here.
    return str(ModelCard(re.sub(r"\n{3,}", "\n\n", content)))


def linked_files(card: str) -> list[str]:
    """Return the files beside a card that it shows or links to."""
    return [name for name in CARD_FILES if f"]({name})" in card]


def renamed_card(card: str, name: str) -> str:
    """Return a card of `create_model_card` with another repository's id in its title, its code and its metadata."""
    title = re.search(r"^# (\S+)$", card, flags=re.MULTILINE)
    if title is None:
        return card
    old = re.escape(title[1])
    return re.sub(rf"(?m)(?<=^# ){old}$|(?<=[`\"]){old}(?=[`\"])|(?<=^- name: ){old}$", lambda _: name, card)


def card_title(card: str) -> str | None:
    """Return the repository's id in the title of a card of `create_model_card`, or None."""
    title = re.search(r"^# (\S+)$", card, flags=re.MULTILINE)
    return title[1] if title else None


def format_decimal(value: float) -> str:
    """Return a float with the digits that matter at its size, the same number of decimals for comparable values."""
    if abs(value) >= 1000:
        return f"{value:,.1f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["decimal"] = format_decimal
    return environment.get_template("card.md.jinja")


def _context(facts: StudentFacts) -> dict[str, Any]:
    """Return the template's values, all of them fit to be published."""
    repo, tag = repository_name(facts.repo_name), _kept(facts.pipeline_tag)
    results = {name: value for name, value in facts.results.items() if is_plain_text(name)}
    table, terms = _table(facts), combined_license(facts.sources)
    return {
        "metadata": _metadata(facts, repo, results, table, terms).to_yaml(),
        "repo": repo,
        "summary": summary(facts),
        "loader": facts.loader,
        "student_class": facts.student_class,
        "processor": facts.processor,
        "classes": ", ".join(sorted({facts.student_class, facts.processor or facts.student_class})),
        "usage": loading_code(repo, facts.student_class, facts.processor),
        "labels": _labels(facts.labels),
        "base_id": _kept(facts.base_model, is_hub_id),
        "task": tag,
        "example": EXAMPLES.get(tag or "") if facts.processor else None,
        "dataset": dataset_link(facts.dataset),
        "is_semckd": _is_semckd(facts.method),
        "results": results,
        "teacher_results": _teacher_results(facts, results),
        "table": table,
        "license": "" if facts.license and terms.is_free else terms.sentence,
        "settings": distillation_rows(facts.settings, facts.method, tag),
        "training": training_rows(facts.training) | version_rows(facts.versions),
        "files": [name for name in facts.files if name == ASSOCIATION_PICTURE or table is not None],
    }


def _metadata(
    facts: StudentFacts, repo: str, results: Mapping[str, float], table: CardTable | None, terms: LicenseTerms
) -> ModelCardData:
    """Return the YAML block's content; unknown entries are left out, not guessed."""
    dataset, task = _kept(facts.dataset, is_dataset_id), _kept(facts.pipeline_tag)
    known = dict(results) | ({} if table is None else {table.metric: table.quality})
    metrics = [name for name in known if name != "loss"]  # the Hub knows no metric of that name
    rounded = {name: float(f"{known[name]:.6g}") for name in metrics if math.isfinite(known[name])}
    evaluations = [
        EvalResult(task_type=task, dataset_type=dataset, dataset_name=dataset, metric_type=name, metric_value=value)
        for name, value in rounded.items()
        if task and dataset
    ]
    own = ["knowledge-distillation", *(["semckd"] if _is_semckd(facts.method) else []), "generated_from_trainer"]
    base = _kept(facts.base_model, is_model_id)
    return ModelCardData(
        base_model=base,
        base_model_relation=RELATIONS[facts.loader] if base else None,
        datasets=[dataset] if dataset else None,
        eval_results=evaluations or None,
        language=_plain_items(facts.language) or None,
        library_name=LIBRARIES[facts.loader],
        license=_kept(facts.license) or terms.license,
        license_name=None if facts.license else terms.license_name,
        license_link=None if facts.license else terms.license_link,
        metrics=metrics or None,
        model_name=repo if evaluations else None,
        pipeline_tag=task,
        tags=[*own, *(["lora"] if facts.adapter_type == LORA else []), *_plain_items(facts.tags)],
    )


def _table(facts: StudentFacts) -> CardTable | None:
    """Return the deploy table; one that cannot be read costs only itself."""
    try:
        return None if facts.evaluation is None else card_table(facts.evaluation)
    except InputError as error:
        logger.warning("The model card has no deploy table. %s", error)
        return None


def _teacher_results(facts: StudentFacts, results: Mapping[str, float]) -> dict[str, float]:
    """Return what the card of the only teacher says of the same metrics on the same data set."""
    names = [facts.teacher] if isinstance(facts.teacher, str) else list(facts.teacher or ())
    found = [entry.results for entry in facts.sources if names == [entry.name]]
    known = found[-1] if found else {}
    return {name: known[facts.dataset or "", name] for name in results if (facts.dataset or "", name) in known}


def _is_semckd(method: str) -> bool:
    return "semckd" in method.lower().split(" + ")


def _labels(names: Sequence[str]) -> str | None:
    """Return the argument that gives a head its classes, as Python."""
    if not names:
        return None
    own = not all(name.startswith("LABEL_") for name in names)
    if own and len(names) <= MOST_LABELS and all(map(is_plain_text, names)):
        return "id2label={" + ", ".join(f'{place}: "{name}"' for place, name in enumerate(names)) + "}"
    return f"num_labels={len(names)}"


def _kept(text: str | None, allowed: Callable[[str], bool] = is_plain_text) -> str | None:
    return text if text and allowed(text) else None


def _plain_items(value: str | Sequence[str] | None) -> list[str]:
    return list(filter(is_plain_text, [value] if isinstance(value, str) else value or ()))
