"""The marked regions of README.md and docs/results: what they say, and where they are put, by hand."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hf_semckd.errors import InputError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def load(name: str) -> Any:
    """Import one of the scripts."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def regions() -> Any:
    return load("accuracy.regions")


@pytest.fixture(scope="module")
def pages() -> Any:
    return load("pages")


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


def test_the_sentence_counts_for_and_against(regions):
    assert regions.fresh_sentence(fresh(), ["a", "b", "c"]) == (
        "With 3 fresh seeds a pair, semckd is more accurate than kd on 2 of 3 pairs (1 significantly) and less "
        "accurate on 1 (1 significantly), +1.33 points on average (paired t-tests at 5 % after Holm over these 3 "
        "comparisons)."
    )


def test_the_table_by_hand(regions):
    # t of b is 1 / (2 / sqrt(3)) = 0.866 with 2 degrees of freedom: p = 1 - t / sqrt(t^2 + 2) = 0.478, the largest,
    # so Holm leaves it; the interval is 1 -+ 4.3027 * 2 / sqrt(3).
    lines = regions.fresh_table(fresh(), ["a", "b", "c"]).splitlines()
    assert lines[0].startswith("| pair | seeds | kd | semckd | difference |")
    assert lines[3] == "| b | 3 | 80.00 | 81.00 | +1.00 ± 2.00 | [-3.97, +5.97] | 0.48 | level |"
    assert [line.split(" | ")[-1] for line in lines[2:]] == ["better |", "level |", "worse |"]


def test_fresh_seeds_are_kept_apart(regions):
    old = [*runs("a", "kd", 0, 0.1, 0.2), *runs("a", "kd", 100, 0.3, split="tuning")]
    apart, own = regions._apart([*old, *fresh()])
    assert own == old and apart == fresh()
    # A seed of the first ten is none of the fresh ones, and the other way round.
    assert {row["seed"] for row in apart} <= set(regions.FRESH_SEEDS)
    assert not set(range(10)) & set(regions.FRESH_SEEDS)


def test_gains_by_hand(regions):
    found = regions.accuracy_regions([*fresh(), *runs("a", "kd", 0, 0.5, 0.6), *runs("a", "semckd", 0, 0.53, 0.65)])
    assert found["gain"]("semckd", "kd", "a") == "+4.0"
    assert found["gain"]("kd", "semckd", "a") == "-4.0"
    assert found["fresh-gain"]("semckd", "kd", "c", "a", "b") == "-2.1 to +5.1"
    assert found["accuracy"]("semckd", "a") == "59.0"


@pytest.fixture
def steps(tmp_path):
    """Return the regions of two measurements, 1.5 and 2 times the price of a KD step of 10 ms."""
    for name, times in (("one", 15), ("two", 20)):
        seconds = {"kd": [0.010, 0.010, 0.011], "semckd": [times / 1000] * 3}
        memory = {"semckd": {"peak_bytes": times * 10**9}}
        pair = {"seconds": seconds, "memory": memory, "skipped": {}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"pairs": {"bert, batch 128": pair}}))
    return load("step_cost.regions").step_regions(tmp_path)


def test_prices_by_hand(steps):
    assert steps["overhead"]("one", "two") == "50 to 100 %"
    assert steps["extra"]("two") == "10 to 10 ms"
    assert steps["milliseconds"]("one", "bert", "semckd") == "15 ms"
    assert steps["gigabytes"]("two", "bert", "semckd") == "20.0 GB"
    assert steps["price"]("two", "bert", "semckd") == "2.00"


def test_regions_are_filled_as_blocks_or_within_a_line(pages):
    found = {"table": lambda: "| 1 |", "sum": lambda *values: str(sum(map(int, values)))}
    page = "x\n<!-- table -->\nold\n<!-- /table -->\ny <!-- sum 1 2 -->5<!-- /sum --> <!-- sum -->?<!-- /sum -->\n"
    filled = "x\n<!-- table -->\n| 1 |\n<!-- /table -->\ny <!-- sum 1 2 -->3<!-- /sum --> <!-- sum -->0<!-- /sum -->\n"
    assert pages.fill(page, found) == filled
    assert pages.fill(filled, found) == filled


def test_a_region_that_nothing_computes_is_refused(pages):
    with pytest.raises(InputError, match="headlines(.|\n)*such as headline"):
        pages.fill("<!-- headlines -->x<!-- /headlines -->", {"headline": str, "table": str})


def test_other_comments_are_left_alone(pages):
    page = "<!-- not run: needs the Hub -->\n<!-- one --> <!-- /other -->\n"
    assert pages.fill(page, {}) == page


def test_what_the_shown_protocols_plan_was_run(regions):
    """A method that a protocol names and nobody ran would make the tables look fuller than they are."""
    protocol, rows = importlib.import_module("accuracy.protocol"), importlib.import_module("accuracy.rows")
    missing = {}
    others = (regions.PLANTED, regions.ASSOCIATIONS, regions.TARGETS)
    for name in (*regions.PAIRS, *regions.REGIMES, *others, *regions.NEGATIVE):
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
