"""What the README prints of the accuracy benchmark: which pairs and methods, and what follows from the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

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
STUDY = ("semckd-uniform", "semckd-no-relation", "semckd-weight-3", "semckd-tuned", "semckd-published", "semckd+crd")
# A teacher with its layers out of order and useless ones among them: where a map made by hand is bound to be wrong.
PLANTED = "digits_planted"
PLANTED_METHODS = ("kd", "semckd", "semckd-uniform", "semckd-one-to-one", "semckd-last")


def read_pairs(results: Path) -> list[Row]:
    """Return the rows of the README's pairs."""
    return [row for name in (*PAIRS, PLANTED) for row in read_rows(results / f"{name}.jsonl")]


def blocks(rows: Sequence[Row]) -> dict[str, str]:
    """Return the texts that the README must contain word for word, by what they are."""
    shown = [pair for pair in PAIRS if any(row["protocol"] == pair for row in rows)]
    made = {row["method"] for row in rows if row["split"] == "test"}
    methods = [name for name in METHODS if name in made]
    texts = {
        "headline": headline_sentence(headline(rows, shown, methods)),
        "methods": main_table(rows, shown, methods),
        "study": main_table(rows, shown, ["kd", "semckd", *(name for name in STUDY if name in made)]),
    }
    planted = [row for row in rows if row["protocol"] == PLANTED]
    texts["planted"] = main_table(planted, [PLANTED], [name for name in PLANTED_METHODS if _is_in(planted, name)])
    if _is_in(planted, "semckd"):
        texts["found"] = _found(planted)
    return texts


def _found(rows: Sequence[Row]) -> str:
    """Say how much weight the association leaves to the useless layers, which are the last ones."""
    tests = [row for row in rows if row["method"] == "semckd" and row["split"] == "test"]
    weights = np.mean([row["extras"]["association"] for row in tests], axis=0)
    useless = tests[0]["settings"]["teacher"]["planted"]["useless"]
    left, equal = 100 * weights[:, -useless:].mean(), 100 / weights.shape[1]
    return (
        f"The similarity weights find the useless layers out: each is left {left:.1f} % of the weight (mean of "
        f"{len(tests)} seeds), where equal weights give it {equal:.1f} %. With that they are level with equal weights "
        "all the same, and better than both maps made by hand."
    )


def _is_in(rows: Sequence[Row], method: str) -> bool:
    return any(row["method"] == method for row in rows)


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
