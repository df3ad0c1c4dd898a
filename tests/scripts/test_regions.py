"""scripts/accuracy/readme.py: what the pages say of fresh seeds, and where texts are put, by hand."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hf_semckd.errors import InputError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def readme() -> Any:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("accuracy.readme")
    finally:
        sys.path.remove(str(SCRIPTS))


def runs(protocol: str, method: str, first: int, *values: float, split: str = "test") -> list[dict[str, Any]]:
    """The rows of a method, with the seeds first, first + 1, ..."""
    shared = {"protocol": protocol, "method": method, "split": split, "settings": {"tuned": {}}, "extras": {}}
    return [{**shared, "seed": first + index, "value": value} for index, value in enumerate(values)]


def fresh() -> list[dict[str, Any]]:
    """Differences in points: a 5.0, 5.1, 5.2, b 1, -1, 3, c -2, -2.1, -2.2."""
    return [
        *runs("a", "kd", 10, 0.70, 0.71, 0.72),
        *runs("a", "semckd", 10, 0.75, 0.761, 0.772),
        *runs("b", "kd", 10, 0.80, 0.80, 0.80),
        *runs("b", "semckd", 10, 0.81, 0.79, 0.83),
        *runs("c", "kd", 10, 0.50, 0.50, 0.50),
        *runs("c", "semckd", 10, 0.48, 0.479, 0.478),
    ]


def test_the_sentence_counts_for_and_against(readme):
    assert readme.fresh_sentence(fresh(), ["a", "b", "c"]) == (
        "With 3 fresh seeds a pair, semckd is more accurate than kd on 2 of 3 pairs (1 significantly) and less "
        "accurate on 1 (1 significantly), +1.33 points on average (paired t-tests at 5 % after Holm over these 3 "
        "comparisons)."
    )


def test_the_table_by_hand(readme):
    # t of b is 1 / (2 / sqrt(3)) = 0.866 with 2 degrees of freedom: p = 1 - t / sqrt(t^2 + 2) = 0.478, the largest,
    # so Holm leaves it; the interval is 1 -+ 4.3027 * 2 / sqrt(3).
    lines = readme.fresh_table(fresh(), ["a", "b", "c"]).splitlines()
    assert lines[0].startswith("| pair | seeds | kd | semckd | difference |")
    assert lines[3] == "| b | 3 | 80.00 | 81.00 | +1.00 ± 2.00 | [-3.97, +5.97] | 0.48 | level |"
    assert [line.split(" | ")[-1] for line in lines[2:]] == ["better |", "level |", "worse |"]


def test_fresh_seeds_are_kept_apart(readme):
    old = [*runs("a", "kd", 0, 0.1, 0.2), *runs("a", "kd", 100, 0.3, split="tuning")]
    apart, own = readme._apart([*old, *fresh()])
    assert own == old and apart == fresh()
    # A seed of the first ten is none of the fresh ones, and the other way round.
    assert {row["seed"] for row in apart} <= set(readme.FRESH_SEEDS)
    assert not set(range(10)) & set(readme.FRESH_SEEDS)


def test_texts_are_put_between_their_marks(readme):
    page = "x\n<!-- one -->\nold\n<!-- /one -->\ny\n<!-- two -->\n<!-- /two -->\n"
    assert readme.updated(page, {"one": "1", "two": "2"}) == (
        "x\n<!-- one -->\n1\n<!-- /one -->\ny\n<!-- two -->\n2\n<!-- /two -->\n"
    )


@pytest.mark.parametrize("page", ["", "<!-- one -->\n", "<!-- /one -->", "<!-- one --> <!-- /one -->"])
def test_a_page_without_the_marks_is_refused(readme, page):
    with pytest.raises(InputError, match="no place for `one`"):
        readme.updated(page, {"one": "1"})


def test_what_the_shown_protocols_plan_was_run(readme):
    """A method that a protocol names and nobody ran would make the tables look fuller than they are."""
    protocol, rows = importlib.import_module("accuracy.protocol"), importlib.import_module("accuracy.rows")
    missing = {}
    others = (readme.PLANTED, readme.ASSOCIATIONS, readme.TARGETS)
    for name in (*readme.PAIRS, *readme.REGIMES, *others, *readme.NEGATIVE):
        (planned,) = protocol.read_protocols(SCRIPTS / "protocols" / f"{name}.yaml")
        run = {
            (row["method"], row["seed"])
            for row in rows.read_rows(SCRIPTS / "results" / "accuracy" / f"{name}.jsonl")
            if row["split"] == "test"
        }
        wanted = {(method.name, seed) for method in planned.methods for seed in planned.test_seeds}
        if wanted - run:
            missing[name] = Counter(method for method, _ in wanted - run)
    assert not missing
