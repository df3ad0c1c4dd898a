"""What the Hub checks of a model card: the metadata at the top of a README."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

RELATIONS = ("adapter", "merge", "quantized", "finetune")


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Return the errors and the warnings about the metadata at the top of a README."""
    try:
        data = _front_matter(content)
    except ValueError as error:
        return [str(error)], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return [f"the metadata must be a mapping, not {type(data).__name__}"], []
    errors = []
    for name in ("license", "library_name", "pipeline_tag", "tags", "datasets", "metrics", "base_model"):
        if not all(isinstance(value, str) for value in items(data.get(name))):
            errors.append(f'"{name}" must be a string or a list of strings')
    if data.get("base_model_relation") not in (None, *RELATIONS):
        errors.append(f'"base_model_relation" must be one of {", ".join(RELATIONS)}')
    errors += [f'"base_model": not a model id: {name}' for name in items(data.get("base_model")) if not is_id(name)]
    return errors + _check_model_index(data.get("model-index")), []


def is_id(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"([\w.-]+/)?[\w.-]+", name) is not None


def _front_matter(content: str) -> Any:
    """Return the metadata of a README, or None when it has none."""
    import yaml  # a dependency of huggingface_hub; the standard library has no YAML parser

    class Loader(yaml.SafeLoader):
        """Refuses a repeated key, as the Hub's parser does and PyYAML does not."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            """Build a mapping."""
            names = [self.construct_object(name, deep=True) for name, _ in node.value]
            repeated = sorted({str(name) for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(f"duplicated mapping key: {', '.join(repeated)}")
            return super().construct_mapping(node, deep)

    match = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", content, re.DOTALL | re.MULTILINE)
    try:
        return yaml.load(match[1], Loader) if match else None
    except yaml.YAMLError as error:
        raise ValueError(f"YAML Metadata Error: {error}") from error


def card_data(content: str) -> dict[str, Any]:
    errors, _ = check_card(content)
    return {} if errors else _front_matter(content) or {}


def _check_model_index(index: Any) -> list[str]:
    """Check the keys without which no client can read the reported results."""
    errors: list[str] = []

    def require(value: Any, names: Iterable[str], where: str) -> None:
        known = value if isinstance(value, dict) else {}
        errors.extend(f'"{where}.{name}" is required' for name in names if known.get(name) is None)

    for i, model in enumerate(items(index)):
        require(model, ["name", "results"], f"model-index[{i}]")
        for j, result in enumerate(items(model.get("results")) if isinstance(model, dict) else []):
            where = f"model-index[{i}].results[{j}]"
            require(result, ["task", "dataset", "metrics"], where)
            if isinstance(result, dict):
                require(result.get("task"), ["type"], f"{where}.task")
                require(result.get("dataset"), ["type", "name"], f"{where}.dataset")
                for k, metric in enumerate(items(result.get("metrics"))):
                    require(metric, ["type", "value"], f"{where}.metrics[{k}]")
    return errors


def items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
