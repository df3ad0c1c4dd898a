"""What README.md and docs/results say of the accuracy benchmark, all of it computed from the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean

from .rows import TEACHER, Row, accuracies, read_rows
from .statistics import compare
from .studies import (
    NegativeMap,
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
# The pairs of images, without the one whose teacher is a transformer and whose student is a CNN.
GAINING = tuple(name for name in PAIRS if name != "vit_resnet_fashion" and not name.startswith("minilm"))
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
# Every way to weight teacher layers that was tried.
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
    """Return the rows of everything that the pages show."""
    paths = [results / f"{name}.jsonl" for name in (*PAIRS, *REGIMES, PLANTED, ASSOCIATIONS, TARGETS, *NEGATIVE)]
    paths += sorted(path for name in SWEEPS for path in results.glob(f"{name}@*.jsonl"))
    return [row for path in paths for row in read_rows(path)]


def accuracy_regions(rows: Sequence[Row]) -> dict[str, Callable[..., str]]:
    """Return what computes each region's text from the rows, by the region's name; see `pages.fill`.

    Regions with arguments, for numbers within a sentence: `gain <method> <other> <pair> ...` and `fresh-gain`, mean
    differences in points; `accuracy <method> <pair>`, a mean in percent.
    """
    fresh, rows = _apart(rows)
    shown, regimes = _tested(rows, PAIRS), _tested(rows, REGIMES)
    methods, study = _made(rows, shown, METHODS), ["kd", "semckd", *_made(rows, shown, STUDY)]
    regions: dict[str, Callable[..., str]] = {
        "headline": lambda: headline_sentence(headline(rows, shown, methods)),
        "methods": lambda: main_table(rows, shown, methods),
        "fresh": lambda: fresh_sentence(fresh, shown),
        "fresh-table": lambda: fresh_table(fresh, shown),
        "planted": lambda: main_table(_of(rows, PLANTED), [PLANTED], PLANTED_METHODS),
        "found": lambda: _found(_of(rows, PLANTED)),
        "study": lambda: main_table(rows, shown, study),
        "tuned": lambda: tuned_table(rows, shown, [*methods, *study]),
        "regimes": lambda: main_table(rows, regimes, _made(rows, regimes, (*METHODS, *STUDY))),
        "regimes-headline": lambda: headline_sentence(headline(rows, regimes, _made(rows, regimes, METHODS))),
        "differences": lambda: difference_table(rows, shown, methods, gaps=False),
        # Of methods without relations, none of which is the default.
        TARGETS: lambda: main_table(_of(rows, TARGETS), [TARGETS], _every(rows, TARGETS), "semckd-no-relation"),
        "mismatch": lambda: mismatch_table(rows, [*shown, PLANTED, ASSOCIATIONS]),
        "gain": partial(_gain, rows),
        "fresh-gain": partial(_gain, fresh),
        "accuracy": lambda method, pair: f"{100 * _mean(rows, method, pair):.1f}",
        "harmful": lambda name: _harmful(negative_map(_of(rows, name), name)),
    }
    for name in (ASSOCIATIONS, PLANTED):
        regions[name] = lambda name=name: main_table(_of(rows, name), [name], _every(rows, name))
    for name in SWEEPS:
        swept = [row for row in rows if row["protocol"].startswith(f"{name}@")]
        regions[name] = lambda name=name, swept=swept: curve_table(curves(swept, name))
    for name in NEGATIVE:
        regions[name] = lambda name=name: negative_table(negative_map(_of(rows, name), name))
    for name in ASSOCIATED:
        regions[f"association_{name}"] = lambda name=name: association_table(
            mean_association([*rows, *fresh], name)[0]
        )
    return regions


def _gain(rows: Sequence[Row], method: str, other: str, *pairs: str) -> str:
    """Return by how many points a method exceeds another, over their common seeds; of several pairs, the range."""
    gains = []
    for pair in pairs:
        found = accuracies(rows, [pair], [method, other])[pair]
        gains.append(compare(pair, method, other, found[method], found[other]).mean)
    low, high = (f"{100 * value:+.1f}" for value in (min(gains), max(gains)))
    return low if low == high else f"{low} to {high}"


def _mean(rows: Sequence[Row], method: str, pair: str) -> float:
    return mean(accuracies(rows, [pair], [method])[pair][method].values())


def _harmful(found: NegativeMap) -> str:
    """Say how many forced pairs of layers lie below the baseline."""
    return negative_sentence(found).split(" pairs")[0]


def _found(rows: Sequence[Row]) -> str:
    """Say how much weight the association leaves to the useless layers, which are the last ones."""
    weights, seeds = mean_association(rows, PLANTED)
    useless = rows[0]["settings"]["teacher"]["planted"]["useless"]
    left, equal = 100 * weights[:, -useless:].mean(), 100 / weights.shape[1]
    return (
        f"The similarity weights detect the useless layers: each gets {left:.1f} % of the weight (mean of {seeds} "
        f"seeds), where equal weights give it {equal:.1f} %. The accuracy is that of equal weights all the same, and "
        "better than with either map made by hand."
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
