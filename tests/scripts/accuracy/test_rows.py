"""scripts/accuracy/rows.py: what is kept of a run, what is refused, and what a killed run leaves behind."""

from __future__ import annotations

import json
import threading

import pytest
from accuracy import rows
from accuracy_cases import row


def test_what_is_appended_is_read_back(tmp_path):
    path = tmp_path / "new" / "digits.jsonl"
    written = [row(seed=1), row(seed=2, commit=None, value=1, extras={"name": "ä\nb"})]
    for entry in written:
        rows.append_row(path, entry)
    assert rows.read_rows(path) == written
    assert path.read_bytes().count(b"\n") == 2


def test_a_folder_is_read_by_the_names_of_its_files(tmp_path):
    rows.append_row(tmp_path / "b.jsonl", row(protocol="b"))
    rows.append_row(tmp_path / "a.jsonl", row(protocol="a"))
    (tmp_path / "notes.txt").write_text("no row")
    assert [entry["protocol"] for entry in rows.read_rows(tmp_path)] == ["a", "b"]


def test_nothing_is_there_yet(tmp_path):
    assert rows.read_rows(tmp_path) == rows.read_rows(tmp_path / "missing.jsonl") == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"value": 1.01}, r"Wrong value .*\n  received: 1\.01"),
        ({"value": -0.1}, "Wrong value"),
        ({"value": float("nan")}, "Wrong value"),
        ({"value": True}, r"True \(bool\)"),
        ({"value": "0.5"}, r"'0\.5' \(str\)"),
        ({"seed": 1.0}, "Wrong seed"),
        ({"split": "train"}, "tuning or test"),
        ({"metric": "f1"}, "Wrong metric"),
        ({"seconds": float("inf")}, "Wrong seconds"),
        ({"seconds": float("nan")}, "Wrong seconds"),
        ({"parameters": -1}, "Wrong parameters"),
        ({"settings": {}}, 'a dict under "tuned"'),
        ({"settings": {"tuned": 10.0}}, 'a dict under "tuned"'),
        ({"extras": {"loss": float("nan")}}, "finite numbers"),
        ({"settings": {"tuned": {"weight": float("inf")}}}, "finite numbers"),
        ({"extras": {"a": {1, 2}}}, "set is not JSON serializable"),
        ({"vale": 0.5}, r"unknown \['vale'\]"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        rows.append_row(tmp_path / "digits.jsonl", row(**changes))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_key_is_named(tmp_path):
    entry = row()
    del entry["machine"]
    with pytest.raises(ValueError, match=r"missing \['machine'\]"):
        rows.append_row(tmp_path / "digits.jsonl", entry)


# ---- Killed runs, duplicates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_an_unfinished_last_line_is_left_out_and_cut_off(tmp_path, kept):
    path = tmp_path / "digits.jsonl"
    rows.append_row(path, row(seed=1))
    with open(path, "ab") as file:
        file.write(json.dumps(row(seed=2)).encode()[:kept])
    with pytest.warns(UserWarning, match="digits.jsonl: left out an unfinished last line"):
        assert rows.read_rows(path) == [row(seed=1)]
    with pytest.warns(UserWarning, match="cut off an unfinished last line"):
        rows.append_row(path, row(seed=3))
    assert rows.read_rows(path) == [row(seed=1), row(seed=3)]


def test_a_last_line_that_is_cut_within_a_character_is_left_out(tmp_path):
    path = tmp_path / "digits.jsonl"
    path.write_bytes('{"protocol": "ä'.encode()[:-1])
    with pytest.warns(UserWarning, match="unfinished"):
        assert rows.read_rows(path) == []


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "digits.jsonl"
    path.write_text(json.dumps(row(seed=1)))
    assert rows.read_rows(path) == [row(seed=1)]
    rows.append_row(path, row(seed=2))
    assert rows.read_rows(path) == [row(seed=1), row(seed=2)]


@pytest.mark.parametrize("line", ['{"half": ', "[1]", json.dumps(row(value=2.0)), json.dumps(row(value=float("nan")))])
def test_another_broken_line_is_named(tmp_path, line):
    path = tmp_path / "digits.jsonl"
    path.write_text(f"{json.dumps(row())}\n{line}\n{json.dumps(row(seed=2))}\n")
    with pytest.raises(ValueError, match=r"digits\.jsonl, line 2: Wrong"):
        rows.read_rows(path)


def test_of_duplicates_the_later_wins(tmp_path):
    path = tmp_path / "digits.jsonl"
    for entry in (row(value=0.5), row(seed=2), row(value=0.6)):
        rows.append_row(path, entry)
    with pytest.warns(UserWarning, match=r"more than one row of digits, semckd, 1, test, \{\}"):
        found = rows.read_rows(path)
    assert [(entry["seed"], entry["value"]) for entry in found] == [(1, 0.6), (2, 0.75)]


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "digits.jsonl"

    def write(begin: int) -> None:
        for seed in range(begin, begin + 10):
            rows.append_row(path, row(seed=seed, extras={"long": "x" * 20000}))

    threads = [threading.Thread(target=write, args=(begin,)) for begin in (0, 10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry["seed"] for entry in rows.read_rows(path)) == list(range(30))


# ---- Keys ----------------------------------------------------------------------------------------------------------


def test_the_key_is_of_what_was_tuned():
    tuned = {"b": 10.0, "a": {"y": 1, "x": [0.5, 2.0]}}
    expected = ("digits", "semckd", 1, "test", '{"a":{"x":[0.5,2],"y":1},"b":10}')
    assert rows.key_of(row(settings={"tuned": tuned, "epochs": 3})) == expected
    same = {"a": {"x": [0.5, 2], "y": 1.0}, "b": 10}
    assert rows.key_of(row(settings={"tuned": same, "epochs": 9}, value=0.1, machine="another")) == expected


@pytest.mark.parametrize(
    "changes",
    [{"protocol": "b"}, {"method": "kd"}, {"seed": 2}, {"split": "tuning"}, {"settings": {"tuned": {"a": True}}}],
)
def test_other_runs_have_other_keys(changes):
    assert rows.key_of(row(**changes)) != rows.key_of(row())


# ---- Accuracies ----------------------------------------------------------------------------------------------------


def test_accuracies_are_those_of_the_test_split_by_seed():
    found = rows.accuracies(
        [
            row(seed=3, value=0.3),
            row(seed=2, value=0.2),
            row(seed=2, value=0.9, split="tuning"),
            row(method="kd"),
            row(protocol="other"),
        ],
        ["digits", "absent"],
        ["semckd", "fitnet"],
    )
    assert found == {"digits": {"semckd": {2: 0.2, 3: 0.3}, "fitnet": {}}, "absent": {"semckd": {}, "fitnet": {}}}
    assert list(found["digits"]["semckd"]) == [2, 3]


def test_test_rows_of_two_choices_are_refused():
    entries = [row(seed=seed, settings={"tuned": {"feature_weight": seed}}) for seed in (1, 10)]
    with pytest.raises(ValueError, match=r'semckd on digits differ.*\n.*\{"feature_weight":1\} and'):
        rows.accuracies(entries, ["digits"], ["semckd"])
