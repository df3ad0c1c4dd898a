"""scripts/step_cost/summary.py: ratios, targets and tables by hand."""

from __future__ import annotations

import pytest
from step_cases import record
from step_cost.summary import paired_ratio, parts_table, table, targets_of


def test_ratios_are_taken_within_a_round_and_not_between_medians():
    # By round 1.5, 1, 2: median 1.5, quartiles 1.25 and 1.75. The ratio of the medians would be 1.
    ratio = paired_ratio([3.0, 3.0, 8.0], [2.0, 3.0, 4.0])
    assert ratio == {"median": 1.5, "low": 1.25, "high": 1.75}


def test_one_round_has_no_spread():
    assert paired_ratio([3.0], [2.0]) == {"median": 1.5, "low": 1.5, "high": 1.5}


def test_rounds_that_do_not_match_are_refused():
    with pytest.raises(ValueError):
        paired_ratio([1.0, 2.0], [1.0])


def test_targets_say_what_was_reached():
    found = targets_of(record())
    assert found["SemCKD / KD"] == {"value": 1.04, "target": 1.05, "reached": True}
    assert found["cached / CE"]["value"] == pytest.approx(1.1)
    assert found["cached / CE"]["reached"]
    assert found["peak memory / KD"] == {"value": 1.06, "target": 1.05, "reached": False}
    assert found["projections / student"] == {"value": 0.125, "target": 0.2, "reached": True}


@pytest.mark.parametrize(("family", "reached"), [("bert", False), ("vit", False), ("resnet", True)])
def test_convolutional_pairs_have_a_target_of_their_own(family, reached):
    seconds = {"kd": [1.0], "semckd": [1.06]}
    assert targets_of(record(family=family, seconds=seconds))["SemCKD / KD"]["reached"] is reached


def test_what_was_not_measured_has_no_target():
    found = targets_of(record(seconds={"ce": [1.0]}, memory={}, parameters={}))
    assert found == {}


def test_the_table_of_a_stored_file():
    lines = table({"pairs": {"bert-6x384": record()}}).splitlines()
    assert (
        lines[0]
        == "| pair | "
        + " | ".join(
            (
                "CE step, ms",
                "SemCKD / KD",
                "published / KD",
                "cached / CE",
                "peak memory / KD",
                "projections / student",
            )
        )
        + " |"
    )
    assert lines[2] == (
        "| bert-6x384 | 500.0 | 1.040 [1.035, 1.070] (≤ 1.05 reached) | 4.000 [3.500, 4.500] "
        "| 1.100 [1.075, 1.150] (≤ 1.15 reached) | 1.060 (≤ 1.05 missed) | 12.5 % (≤ 20 % reached) |"
    )


def test_the_table_says_what_was_left_out_and_why():
    seconds = {"kd": [1.0], "semckd": [1.0]}
    skipped = {"ce": "not asked for", "cached": "not asked for", "published": "it needs 9 GB"}
    text = table({"pairs": {"p": record(seconds=seconds, skipped=skipped)}})
    assert "- p: not timed: ce, cached (not asked for)" in text
    assert "- p: not timed: published (it needs 9 GB)" in text
    assert "- p: peak memory not measured: published (it is too large)" in text


def test_the_table_says_when_others_used_the_processor():
    conditions = {"device": "cpu", "torch_threads": 1}
    stored = {"pairs": {"p": record(conditions=conditions, processor_share=0.7)}}
    assert "- p: measured on a busy machine: the process had a processor for 70 % of the time" in table(stored)
    stored["pairs"]["p"]["processor_share"] = 0.99
    assert "busy" not in table(stored)


def test_the_parts_of_several_pairs_stand_side_by_side():
    stored = {"pairs": {"a": record(), "b": record(shares_of_kd={"logits term": 0.25}), "c": record(shares_of_kd={})}}
    lines = parts_table(stored).splitlines()
    assert lines[0] == "| part | a | b |"
    assert lines[2:] == ["| teacher forward | 0.500 | - |", "| logits term | - | 0.250 |"]
    assert parts_table({"pairs": {}}) == ""
