"""The directives `config-fields` and `recipe-fields`: options, from the metadata of the fields that hold them."""

import json
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from hf_semckd import SemCKDConfig
from hf_semckd.config import distillation_fields
from hf_semckd.recipes.schema import PARTS


def described(kind: type, names: Iterable[str], prefix: str = "") -> str:
    """Return fields of a dataclass as MyST Markdown: name, type, default and help."""
    known, hints = {entry.name: entry for entry in fields(kind)}, get_type_hints(kind)
    return "\n".join(
        f":::{{py:attribute}} {prefix}{name}\n"
        f":type: {type_name(hints[name])}\n"
        # Quoted twice: directives read their options as YAML.
        f":value: {json.dumps(repr(default_of(known[name])))}\n\n{known[name].metadata['help']}\n:::\n"
        for name in names
    )


def type_name(hint: Any) -> str:
    """Return a type as it is written, without the modules of its names."""
    if isinstance(hint, UnionType):
        return " | ".join(map(type_name, get_args(hint)))
    if get_origin(hint) is Literal:
        return f"Literal[{', '.join(map(repr, get_args(hint)))}]"
    if hint is type(None):
        return "None"
    return (
        hint.__name__
        if isinstance(hint, type) and get_origin(hint) is None
        else str(hint).replace("typing.", "")
    )


def default_of(entry: Field[Any]) -> Any:
    """Return what a field holds where it is not given."""
    return entry.default if entry.default is not MISSING else entry.default_factory()  # type: ignore[misc]


class ConfigFields(SphinxDirective):
    """Shows every field that `SemCKDConfig` adds to `TrainingArguments`; takes no arguments."""

    def run(self) -> list[nodes.Node]:
        """Return the nodes that take the directive's place."""
        text = described(SemCKDConfig, distillation_fields(), "hf_semckd.SemCKDConfig.")
        return self.parse_text_to_nodes(text)


class RecipeFields(SphinxDirective):
    """Shows every field of a part of a recipe, which the argument names by its title in `--help`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the nodes that take the directive's place."""
        (part,) = (kind for kind in PARTS if kind._argument_group_name == self.arguments[0])
        return self.parse_text_to_nodes(
            described(part, (entry.name for entry in fields(part)))
        )


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    app.add_directive("config-fields", ConfigFields)
    app.add_directive("recipe-fields", RecipeFields)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
