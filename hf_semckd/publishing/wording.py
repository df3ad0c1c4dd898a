"""Names of models and data sets, and sentences about them, in Markdown for a model card."""

import os

from .facts import StudentFacts
from .redaction import is_dataset_id, is_hub_id, is_plain_text

LORA = "LORA"  # as PEFT spells it


def summary(facts: StudentFacts) -> str:
    """Return what a student is, in one sentence without the name that it begins with."""
    adapter = facts.loader == "peft"
    base, data = model_link(facts.base_model), dataset_link(facts.dataset)
    kind = "a LoRA adapter" if facts.adapter_type == LORA else "an adapter" if adapter else "a model"
    said = f"is {kind} with {facts.parameters:,} parameters"
    if base:
        said += f" for {base}" if adapter else f", initialized from {base} and"
    elif not adapter:
        said += ","
    said += (", " if adapter else " ") + "trained by knowledge distillation"
    said += f" ({facts.method})" if is_plain_text(facts.method) else ""
    teachers = teacher_links(facts)
    if teachers:
        said += f" from {teachers}"
        count = facts.teacher_parameters
        times = "" if adapter or not count else f", {count / facts.parameters:.3g} times as many"
        said += f" ({count:,} parameters{times})" if count else ""
    return said + (f" on {data}" if data else "") + "."


def teacher_links(facts: StudentFacts) -> str:
    """Return the names of the teachers, each once."""
    names = [facts.teacher] if isinstance(facts.teacher, str) else facts.teacher or ()
    return " and ".join(dict.fromkeys(filter(None, map(model_link, names))))


def model_link(name: str | None) -> str | None:
    """Return a model's name as Markdown, linked where it has a user and so a page."""
    if not name:
        return None
    if not is_hub_id(name):
        return "a local model"
    return f"[{name}](https://huggingface.co/{name})" if "/" in name else f"`{name}`"


def dataset_link(name: str | None) -> str | None:
    """Return a data set's name as Markdown: a link, or a description in words."""
    if not name:
        return None
    if is_dataset_id(name):
        return f"[{name}](https://huggingface.co/datasets/{name})"
    # One word that is not an id, such as "train.csv", may be a file or a folder.
    described = is_hub_id(name) or (is_plain_text(name) and " " in name and not os.path.exists(name))
    return name if described else "a local data set"
