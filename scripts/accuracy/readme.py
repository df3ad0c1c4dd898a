"""What the README and the page of results print of the accuracy benchmark, all of it computed from the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_semckd.errors import InputError

from .rows import TEACHER, Row, read_rows
from .studies import (
    association_table,
    curve_table,
    curves,
    mean_association,
    mismatch_table,
    negative_map,
    negative_sentence,
    negative_table,
)
from .tables import (
    difference_table,
    fresh_sentence,
    fresh_table,
    headline,
    headline_sentence,
    main_table,
    tuned_table,
)

PAIRS = (
    "resnet_fashion",
    "resnet_regnet_fashion",
    "vit_fashion",
    "resnet_vit_fashion",
    "vit_resnet_fashion",
    "deep_vit_fashion",
    "dinov2_emoji",
    "minilm_snippets",
    "minilm_newsgroups",
)
BASELINES = (
    "kd", "fitnet", "at", "sp", "vid", "pkt", "rkd", "cc", "crd", "simkd", "pkd", "minilm", "layer-map",
)  # fmt: skip
METHODS = ("student", *BASELINES, "semckd-published", "semckd")
# What the parts of the default are worth, in a family of comparisons of its own.
STUDY = (
    "kd-untuned", "semckd-similarity", "semckd-one-to-one", "semckd-uniform", "semckd-linear",
    "semckd-all-layers", "semckd-no-relation", "semckd-random-start", "semckd-zero-start", "semckd-tuned",
    "semckd-published", "semckd+crd",
)  # fmt: skip
# Pairs from above with other labels, wrong ones or all there are; and a student that is pretrained.
REGIMES = (
    "resnet_fashion_noisy",
    "resnet_fashion_full",
    "minilm_snippets_full",
    "minilm_newsgroups_full",
    "minilm_first_layers",
)
# Every way to weigh teacher layers that is known here.
ASSOCIATIONS = "digits_association"
# Standardized targets apart from the weights.
TARGETS = "digits_targets"
# A teacher with its layers out of order and useless ones among them: where a map made by hand is bound to be wrong.
PLANTED = "digits_planted"
PLANTED_METHODS = ("kd", "semckd", "semckd-uniform", "semckd-one-to-one", "semckd-last")
SWEEPS = ("few_labels", "noisy_labels", "batch_size", "feature_weight")
NEGATIVE = ("negative_map", "negative_map_cnn")
# Where it is shown which teacher layers the default weighs.
ASSOCIATED = ("resnet_fashion",)
# One question, asked again with seeds that nobody had seen: is the default better than logit distillation?
FRESH_SEEDS = range(10, 30)


def read_shown(results: Path) -> list[Row]:
    """Return the rows of all that the README and the page of results show."""
    paths = [results / f"{name}.jsonl" for name in (*PAIRS, *REGIMES, PLANTED, ASSOCIATIONS, TARGETS, *NEGATIVE)]
    paths += sorted(path for name in SWEEPS for path in results.glob(f"{name}@*.jsonl"))
    return [row for path in paths for row in read_rows(path)]


def blocks(rows: Sequence[Row]) -> dict[str, str]:
    """Return the texts that the README must contain word for word, by what they are."""
    fresh, rows = _apart(rows)
    shown = _tested(rows, PAIRS)
    methods = _made(rows, shown, METHODS)
    texts = {
        "headline": headline_sentence(headline(rows, shown, methods)),
        "methods": main_table(rows, shown, methods),
    }
    if fresh:
        texts["fresh"] = fresh_sentence(fresh, shown)
    planted = _of(rows, PLANTED)
    texts["planted"] = main_table(planted, [PLANTED], _made(planted, [PLANTED], PLANTED_METHODS))
    if _made(planted, [PLANTED], ["semckd"]):
        texts["found"] = _found(planted)
    return texts


def detail_blocks(rows: Sequence[Row]) -> dict[str, str]:
    """Return the texts that the page of results must contain word for word, by what they are."""
    fresh, rows = _apart(rows)
    shown, regimes = _tested(rows, PAIRS), _tested(rows, REGIMES)
    methods, study = _made(rows, shown, METHODS), ["kd", "semckd", *_made(rows, shown, STUDY)]
    texts = {
        "study": main_table(rows, shown, study),
        "tuned": tuned_table(rows, shown, [*methods, *study]),
        "regimes": main_table(rows, regimes, _made(rows, regimes, (*METHODS, *STUDY))),
        "regimes-headline": headline_sentence(headline(rows, regimes, _made(rows, regimes, METHODS))),
        # Of what was not run there is nothing to say.
        "differences": difference_table(rows, shown, methods, gaps=False),
    }
    if fresh:
        texts["fresh"] = f"{fresh_sentence(fresh, shown)}\n\n{fresh_table(fresh, shown)}"
    for name in (ASSOCIATIONS, PLANTED):
        texts[name] = main_table(_of(rows, name), [name], _every(rows, name))
    # Of methods without relations, none of which is the default.
    texts[TARGETS] = main_table(_of(rows, TARGETS), [TARGETS], _every(rows, TARGETS), "semckd-no-relation")
    for name in SWEEPS:
        swept = [row for row in rows if row["protocol"].startswith(f"{name}@")]
        texts[name] = curve_table(curves(swept, name))
    for name in _tested(rows, NEGATIVE):
        found = negative_map(_of(rows, name), name)
        texts[name] = f"{negative_table(found)}\n\n{negative_sentence(found)}"
    for name in _tested(rows, ASSOCIATED):
        texts[f"association_{name}"] = association_table(mean_association([*rows, *fresh], name)[0])
    texts["mismatch"] = mismatch_table(rows, [*shown, PLANTED, ASSOCIATIONS])
    return texts


def updated(text: str, texts: Mapping[str, str]) -> str:
    """Return a Markdown text with what stands between `<!-- name -->` and `<!-- /name -->` replaced.

    Args:
        text: The README, or the page of results.
        texts: What `blocks` or `detail_blocks` returned.

    Raises:
        InputError: When a pair of marks is missing.
    """
    for name, content in texts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin not in text or end not in text:
            raise InputError(
                f"The page has no place for `{name}`",
                received="a text without the marks",
                expected=f"{begin.strip()} and {end}",
                todo="put them where the text belongs",
            )
        before, rest = text.split(begin, 1)
        text = f"{before}{begin}{content}\n{end}{rest.split(end, 1)[1]}"
    return text


def _found(rows: Sequence[Row]) -> str:
    """Say how much weight the association leaves to the useless layers, which are the last ones."""
    weights, seeds = mean_association(rows, PLANTED)
    useless = rows[0]["settings"]["teacher"]["planted"]["useless"]
    left, equal = 100 * weights[:, -useless:].mean(), 100 / weights.shape[1]
    return (
        f"The similarity weights find the useless layers out: each is left {left:.1f} % of the weight (mean of "
        f"{seeds} seeds), where equal weights give it {equal:.1f} %. With that they are level with equal weights "
        "all the same, and better than both maps made by hand."
    )


def _apart(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return the rows of the fresh seeds, and those of the protocols' own."""
    fresh = [row for row in rows if row["split"] == "test" and row["seed"] in FRESH_SEEDS]
    return fresh, [row for row in rows if row["split"] != "test" or row["seed"] not in FRESH_SEEDS]


def _of(rows: Sequence[Row], protocol: str) -> list[Row]:
    return [row for row in rows if row["protocol"] == protocol]


def _tested(rows: Sequence[Row], protocols: Sequence[str]) -> list[str]:
    """Return the protocols that have rows, in their order."""
    known = {row["protocol"] for row in rows}
    return [name for name in protocols if name in known]


def _made(rows: Sequence[Row], protocols: Sequence[str], methods: Sequence[str]) -> list[str]:
    """Return the methods that were tested on any of the protocols, in their order."""
    made = {row["method"] for row in rows if row["split"] == "test" and row["protocol"] in protocols}
    return [name for name in methods if name in made]


def _every(rows: Sequence[Row], protocol: str) -> list[str]:
    """Return all methods that were tested, in the order of their rows, without the teacher."""
    names = dict.fromkeys(row["method"] for row in _of(rows, protocol) if row["split"] == "test")
    return [name for name in names if name != TEACHER]
