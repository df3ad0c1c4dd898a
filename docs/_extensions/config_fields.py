"""The directive `config-fields`: the options that `SemCKDConfig` adds, from the metadata of its fields."""

from dataclasses import MISSING, Field, fields
from typing import Any, get_type_hints

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from transformers import TrainingArguments

from hf_semckd import SemCKDConfig


def own_fields() -> list[Field[Any]]:
    """Return the fields that `TrainingArguments` does not have, in order."""
    inherited = {entry.name for entry in fields(TrainingArguments)}
    return [entry for entry in fields(SemCKDConfig) if entry.name not in inherited]


def describe(entry: Field[Any]) -> str:
    """Return one field as MyST Markdown: name, type, default and help."""
    hint = get_type_hints(SemCKDConfig)[entry.name]
    default = entry.default if entry.default is not MISSING else entry.default_factory()  # type: ignore[misc]
    return (
        f":::{{py:attribute}} hf_semckd.SemCKDConfig.{entry.name}\n"
        f":type: {hint.__name__ if isinstance(hint, type) else str(hint).replace('typing.', '')}\n"
        f":value: {default!r}\n\n{entry.metadata['help']}\n:::\n"
    )


class ConfigFields(SphinxDirective):
    """Shows every field; takes no arguments."""

    def run(self) -> list[nodes.Node]:
        """Return the nodes that take the directive's place."""
        return self.parse_text_to_nodes("\n".join(map(describe, own_fields())))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("config-fields", ConfigFields)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
