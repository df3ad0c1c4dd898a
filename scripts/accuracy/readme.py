"""What the README prints of the accuracy benchmark: which pairs and methods, and what follows from the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_semckd.errors import InputError, message

from .rows import Row, read_rows
from .tables import headline, headline_sentence, main_table

PAIRS = (
    "resnet_fashion",
    "vit_fashion",
    "resnet_vit_fashion",
    "vit_resnet_fashion",
    "dinov2_emoji",
    "minilm_snippets",
)
BASELINES = (
    "kd", "fitnet", "at", "sp", "vid", "pkt", "rkd", "cc", "crd", "simkd", "pkd", "minilm", "layer-map",
)  # fmt: skip
METHODS = ("student", *BASELINES, "semckd")
# What the parts of the default are worth, in a family of comparisons of its own.
STUDY = ("semckd-tuned", "semckd-uniform", "semckd-no-relation", "semckd-published", "semckd+crd")


def read_pairs(results: Path) -> list[Row]:
    """Return the rows of the README's pairs."""
    return [row for name in PAIRS for row in read_rows(results / f"{name}.jsonl")]


def blocks(rows: Sequence[Row]) -> dict[str, str]:
    """Return the texts that the README must contain word for word, by what they are."""
    shown = [pair for pair in PAIRS if any(row["protocol"] == pair for row in rows)]
    return {
        "headline": headline_sentence(headline(rows, shown, METHODS)),
        "methods": main_table(rows, shown, METHODS),
        "study": main_table(rows, shown, ("kd", "semckd", *STUDY)),
    }


def updated(text: str, texts: Mapping[str, str]) -> str:
    """Return a Markdown text with what stands between `<!-- name -->` and `<!-- /name -->` replaced.

    Args:
        text: The README.
        texts: What `blocks` returned.

    Raises:
        InputError: When a pair of marks is missing.
    """
    for name, content in texts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin not in text or end not in text:
            raise InputError(
                message(
                    f"The README has no place for `{name}`",
                    received="a text without the marks",
                    expected=f"{begin.strip()} and {end}",
                    todo="put them where the text belongs",
                )
            )
        before, rest = text.split(begin, 1)
        text = f"{before}{begin}{content}\n{end}{rest.split(end, 1)[1]}"
    return text
