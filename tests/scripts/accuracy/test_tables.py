"""scripts/accuracy/tables.py: every number of the tables by hand, from rows whose differences are easily seen."""

from __future__ import annotations

import random
from typing import Any

import pytest
from accuracy import tables

PAIRS = ["a", "b"]
METHODS = ["kd", "fitnet", "semckd"]


def runs(protocol: str, method: str, *values: float, split: str = "test", **tuned: float) -> list[dict[str, Any]]:
    """The rows of a method, with the seeds 0, 1, ..."""
    shared = {"protocol": protocol, "method": method, "split": split, "settings": {"tuned": tuned}}
    return [{**shared, "seed": seed, "value": value} for seed, value in enumerate(values)]


def example() -> list[dict[str, Any]]:
    """On `a` semckd is clearly above kd and below fitnet; on `b` it cannot be told from kd, and fitnet is missing.

    By hand, a: semckd - kd is 5.0, 5.1, 5.2 points, semckd - fitnet -2 each, semckd - student 15.0, 15.1, 15.2;
    b: semckd - kd is 1, -1, 3, semckd - student 10 each.
    """
    return [
        *runs("a", "teacher", 0.95),
        *runs("a", "student", 0.60, 0.61, 0.62),
        *runs("a", "kd", 0.70, 0.71, 0.72),
        *runs("a", "fitnet", 0.77, 0.781, 0.792, feature_weight=10.0),
        *runs("a", "semckd", 0.75, 0.761, 0.772),
        *runs("a", "semckd", 0.99, split="tuning"),
        *runs("b", "student", 0.71, 0.69, 0.73),
        *runs("b", "kd", 0.80, 0.80, 0.80),
        *runs("b", "semckd", 0.81, 0.79, 0.83),
        *runs("c", "kd", 0.5, 0.6),
    ]


# ---- The main table ------------------------------------------------------------------------------------------------


def test_the_main_table_by_hand():
    # ARI of kd: (5.1 / 10 + 1 / 9) / 2 = 31.06 %, of fitnet: -2 / 17.1 = -11.7 %.
    assert tables.main_table(example(), PAIRS, METHODS).splitlines() == [
        "| method | a | b | ARI | semckd − method |",
        "|---|---|---|---|---|",
        "| teacher | 95.00 | - | - | - |",
        "| student | 61.00 ± 1.00 ▼ | 71.00 ± 2.00 ▼ | - | +12.55 |",
        "| kd | 71.00 ± 1.00 ▼ | 80.00 ± 0.00 | +31.1 % | +3.05 |",
        "| fitnet | **78.10 ± 1.10** ▲ | - | -11.7 % | -2.00 |",
        "| semckd | 76.10 ± 1.10 | **81.00 ± 2.00** | - | - |",
    ]


def test_the_order_of_rows_does_not_matter():
    shuffled = example()
    random.Random(0).shuffle(shuffled)
    for name in ("main_table", "difference_table", "headline", "tuned_table"):
        table = getattr(tables, name)
        assert table(shuffled, PAIRS, METHODS) == table(example(), PAIRS, METHODS)


def test_methods_without_rows_and_repeated_names_are_tolerated():
    lines = tables.main_table(example(), PAIRS, ["student", "teacher", "kd", "kd", "crd"]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| teacher", "| student", "| kd", "| crd", "| semckd"]
    assert lines[5] == "| crd | - | - | - | - |"
    assert tables.main_table([], ["a"], ["semckd"]).splitlines()[-1] == "| semckd | - | - | - |"


def test_without_the_reference_nothing_is_marked():
    assert tables.main_table(example(), ["c"], ["kd"]).splitlines()[4] == "| kd | **55.00 ± 7.07** | - | - |"


def test_more_comparisons_ask_for_more():
    # t = 6 with two degrees of freedom: p = 0.0267, which one comparison passes and two do not.
    one = [*runs("a", "kd", 0.5, 0.5, 0.5), *runs("a", "semckd", 0.51, 0.51, 0.516)]
    two = [*one, *runs("b", "kd", 0.5, 0.5, 0.5), *runs("b", "semckd", 0.51, 0.51, 0.516)]
    assert tables.main_table(one, ["a"], ["kd"]).count("▼") == 1
    assert tables.main_table(two, PAIRS, ["kd"]).count("▼") == 0


def test_equal_means_are_both_the_best():
    rows = [*runs("a", "kd", 0.5, 0.7), *runs("a", "semckd", 0.7, 0.5), *runs("a", "teacher", 0.9)]
    assert tables.main_table(rows, ["a"], ["kd"]).count("**60.00 ± 14.14**") == 2
    counts = tables.headline(rows, ["a"], ["kd"])
    assert (counts["best"], counts["best_shared"]) == (0, 1)
    assert "equal on 1, +0.00 points" in tables.headline_sentence(counts)
    assert "best mean on 0 of 1 pair, and shares it on 1 (" in tables.headline_sentence(counts)


def test_pairs_without_a_ratio_are_counted():
    rows = [
        *runs("a", "student", 0.5, 0.5), *runs("a", "kd", 0.6, 0.6), *runs("a", "semckd", 0.65, 0.65),
        *runs("b", "student", 0.5, 0.5), *runs("b", "kd", 0.4, 0.4), *runs("b", "semckd", 0.65, 0.65),
    ]  # fmt: skip
    assert "| +50.0 % (1 of 2 pairs) |" in tables.main_table(rows, PAIRS, ["kd"])
    assert "| - (0 of 1 pair) |" in tables.main_table(rows, ["b"], ["kd"])


def test_the_ari_is_of_the_seeds_that_all_three_have():
    rows = [*runs("a", "student", 0.5), *runs("a", "kd", 0.6, 0.1), *runs("a", "semckd", 0.65, 0.9, 0.9)]
    assert tables.relative_improvement(rows, ["a"], "kd").percent == pytest.approx(50.0)


# ---- Differences and headline --------------------------------------------------------------------------------------


def test_the_differences_by_hand():
    # Half an interval is 4.3027 std / sqrt(3): 0.248 and 4.968. p of b: t = sqrt(3) / 2, 1 - t / sqrt(2.75) = 0.478.
    assert tables.difference_table(example(), PAIRS, METHODS).splitlines() == [
        "| pair | other | difference | std | 95 % interval | n | p | adjusted p | verdict |",
        "|---|---|---|---|---|---:|---|---|---|",
        "| a | student | +15.10 | 0.10 | [+14.85, +15.35] | 3 | < 0.001 | < 0.001 | better |",
        "| a | kd | +5.10 | 0.10 | [+4.85, +5.35] | 3 | < 0.001 | < 0.001 | better |",
        "| a | fitnet | -2.00 | 0.00 | [-2.00, -2.00] | 3 | < 0.001 | < 0.001 | worse |",
        "| b | student | +10.00 | 0.00 | [+10.00, +10.00] | 3 | < 0.001 | < 0.001 | better |",
        "| b | kd | +1.00 | 2.00 | [-3.97, +5.97] | 3 | 0.478 | 0.478 | level |",
        "| b | fitnet | - | - | - | - | - | - | - |",
    ]


def test_comparisons_that_were_not_made_may_be_left_out():
    every = tables.difference_table(example(), PAIRS, METHODS).splitlines()
    left = tables.difference_table(example(), PAIRS, METHODS, gaps=False).splitlines()
    assert [line for line in every if line not in left] == ["| b | fitnet | - | - | - | - | - | - | - |"]
    assert [line for line in left if line not in every] == []


def test_the_headline_by_hand():
    counts = tables.headline(example(), [*PAIRS, "c"], METHODS)
    means = {method: entry.pop("mean_difference") for method, entry in counts["baselines"].items()}
    assert means == pytest.approx({"student": 12.55, "kd": 3.05, "fitnet": -2.0})
    shared = {"level": 0, "level_higher": 0, "level_lower": 0}
    assert counts == {
        "reference": "semckd",
        "pairs": 2,
        "comparisons": 5,
        "best": 1,
        "best_shared": 0,
        "baselines": {
            "student": {"pairs": 2, "wins": 2, "losses": 0, **shared},
            "kd": {"pairs": 2, "wins": 1, "losses": 0, "level": 1, "level_higher": 1, "level_lower": 0},
            "fitnet": {"pairs": 1, "wins": 0, "losses": 1, **shared},
        },
    }


def test_the_headline_in_words():
    assert tables.headline_sentence(tables.headline(example(), PAIRS, METHODS)) == (
        "semckd is more accurate than kd on 2 of 2 pairs (1 significantly), less accurate on 0 (0 significantly) and "
        "equal on 0, +3.05 points on average; of 3 comparisons with 2 other methods semckd is significantly better "
        "in 1, significantly worse in 1 and level in 1; semckd alone has the best mean on 1 of 2 pairs "
        "(paired t-tests at 5 % after Holm over 5 comparisons)."
    )


def test_a_headline_says_where_it_loses():
    rows = [*runs("a", "kd", 0.7, 0.7), *runs("a", "semckd", 0.6, 0.6)]
    sentence = tables.headline_sentence(tables.headline(rows, ["a"], ["kd"]))
    assert "on 0 of 1 pair (0 significantly), less accurate on 1 (1 significantly)" in sentence
    assert "-10.00 points" in sentence and "best mean on 0 of 1 pair" in sentence


def test_a_headline_of_nothing_claims_nothing():
    counts = tables.headline([], PAIRS, METHODS)
    assert counts["baselines"]["kd"]["mean_difference"] is None
    assert tables.headline_sentence(counts) == (
        "of 0 comparisons with 0 other methods semckd is significantly better in 0, significantly worse in 0 and "
        "level in 0; semckd alone has the best mean on 0 of 0 pairs "
        "(paired t-tests at 5 % after Holm over 0 comparisons)."
    )
    alone = tables.headline(runs("a", "semckd", 0.5, 0.6), ["a"], METHODS)
    assert (alone["pairs"], alone["best"]) == (0, 0)


# ---- Tuning --------------------------------------------------------------------------------------------------------


def test_what_was_tuned_by_hand():
    rows = [
        *example(),
        *runs("a", "fitnet", 0.6, split="tuning", feature_weight=1.0),
        *runs("a", "fitnet", 0.7, 0.8, split="tuning", feature_weight=10.0),
        *runs("a", "semckd-tuned", 0.76, 0.771, 0.782, feature_weight=30.0, layers=2),
        *runs("b", "semckd-tuned", 0.8, split="tuning", feature_weight=1.0),
    ]
    methods = ["kd", "fitnet", "semckd-tuned"]
    assert tables.tuned_table(rows, PAIRS, methods).splitlines() == [
        "| pair | method | tried | chosen | default − tuned, points |",
        "|---|---|---:|---|---|",
        "| a | fitnet | 2 | feature_weight=10 | - |",
        "| a | semckd-tuned | 0 | feature_weight=30, layers=2 | -1.00 [-1.00, -1.00] |",
        "| b | semckd-tuned | 1 | - | - |",
    ]


def test_two_choices_at_once_are_refused():
    rows = [*example(), *runs("a", "fitnet", 0.9, feature_weight=1.0)]
    with pytest.raises(ValueError, match="fitnet on a differ in what was tuned"):
        tables.main_table(rows, PAIRS, METHODS)
