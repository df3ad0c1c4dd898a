"""The report: what it says, and that hostile data neither breaks it nor raises a raw error."""

import json
import math
import re
from dataclasses import replace

import pytest
from reports import HOSTILE, association, deploy, row, whole

from hf_semckd.errors import InputError
from hf_semckd.publishing.report.charts import heat_maps, line_chart, ticks
from hf_semckd.publishing.report.groups import short_names, side_groups, teacher_groups
from hf_semckd.publishing.report.history import association_history, curve_of, layer_errors, loss_curves
from hf_semckd.publishing.report.parts import AssociationMap, Curve, DeployTable, Run
from hf_semckd.publishing.report.report import DistillationReport
from hf_semckd.publishing.report.words import association_words, entropy_range, error_words, headline


def test_the_headline_is_computed_from_the_table():
    expected = "The student keeps 97.3% (95%: 96.1 - 98.5%) of the teacher's accuracy with 0.31 times the parameters, "
    assert headline(deploy()) == expected + "3.1 times as fast for single samples."
    assert headline(None) is None and headline(replace(deploy(), rows=deploy().rows[:1])) is None


def test_a_quality_without_a_share_is_told_beside_the_teachers():
    table = replace(deploy(), rows=(deploy().rows[0], row("student", -0.1, (math.nan,) * 3, 500, 6.2)))
    assert headline(table).startswith("The student's accuracy is -0.1 (the teacher's 0.92), with 0.5 times")


@pytest.mark.parametrize(("own", "words"), [(12.375, "1.0% below"), (13.75, "10.0% above")])
def test_of_perplexities_the_lower_is_told_as_the_better(own, words):
    """The share that is kept is the teacher's over the student's."""
    rows = row("teacher", 12.5, (1.0,) * 3, 500, 6.2), row("student", own, (12.5 / own,) * 3, 500, 6.2)
    table = replace(deploy(), rows=rows, metric="perplexity", higher_is_better=False)
    assert headline(table).startswith(f"The student's perplexity of {own:.4g} is {words} the teacher's (12.5)")
    page = " ".join(replace(whole(), deploy=table).page().split())
    assert "the first model&#39;s perplexity divided by the model&#39;s own" in page.replace("'", "&#39;")


def test_a_layer_that_is_hardly_ahead_of_the_next_is_no_preference():
    history = replace(association(), maps=(AssociationMap(1, 9, ((0.05, 0.46, 0.49), (0.3, 0.3, 0.4))),))
    assert association_words(history)[-1] == "No student layer clearly prefers one teacher layer."


def test_an_association_that_is_as_good_as_uniform_is_told_so():
    near = association(entropy=(math.log(3), 0.99 * math.log(3)))
    assert 'association="uniform" would teach much the same' in association_words(near)[0]
    assert "would teach" not in association_words(association(entropy=(1.0, 0.5)))[0]


@pytest.mark.parametrize(("entropy", "share"), [(math.log(4), 0), (0.5 * math.log(4), 50), (0.0, 100)])
def test_the_distance_from_uniform_is_one_minus_the_share_of_log_t(entropy, share):
    history = association(teachers="1234", entropy=(math.log(4), entropy))
    assert f"ended {share}% of the way from uniform to a single layer (0% in" in association_words(history)[0]


def test_with_several_teachers_the_uniform_level_is_that_of_their_shares():
    """By hand: weights of 1/4 over one layer and 3/4 over two are uniform at 1/4, 3/8, 3/8."""
    history = association(teachers=("teachers.0.1", "teachers.1.1", "teachers.1.2"))
    history = replace(history, maps=(AssociationMap(1, 9, ((0.25, 0.375, 0.375),) * 2),))
    levels = entropy_range(history)
    assert levels.uniform == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.375))
    assert levels.single == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert levels.concentration(levels.uniform) == 0 and levels.concentration(levels.single) == pytest.approx(1)


def test_layers_with_a_clear_preference_are_named():
    history = replace(association(), maps=(AssociationMap(1, 9, ((0.1, 0.4, 0.5), (0.3, 0.3, 0.4))),))
    assert "student layer 1 from teacher layer 3 (50%)" in association_words(history)[-1]
    history = replace(association(), maps=(AssociationMap(1, 9, ((0.3, 0.3, 0.4), (0.3, 0.3, 0.4))),))
    assert association_words(history)[-1] == "No student layer clearly prefers one teacher layer."


ROWS = [
    {
        "step": n,
        "loss": 5.0 - n,
        "association": [[n / 10, 1 - n / 10]],
        "association/entropy": 0.5,
        "association_errors": [n],
    }
    for n in range(1, 9)
]


def test_quarters_are_means_of_their_windows():
    history = association_history([*ROWS, {"step": 8, "eval_loss": 1.0}], ["a"], ["b", "c"])
    assert [(entry.first, entry.last) for entry in history.maps] == [(1, 2), (3, 4), (5, 6), (7, 8)]
    assert [entry.weights[0][0] for entry in history.maps] == pytest.approx([0.15, 0.35, 0.55, 0.75])
    assert history.student_layers == ("a",) and history.entropy.values == (0.5,) * 8
    assert association_history(ROWS, [], ["b"]).teacher_layers == ("1", "2")


def test_a_long_log_becomes_means_of_neighbors():
    found = curve_of([{"step": n, "loss": float(n % 2)} for n in range(1, 4801)], "loss")
    assert len(found.steps) == 240 and found.steps[-1] == 4800 and set(found.values) == {0.5}


def test_the_first_and_the_last_errors_are_told_and_layers_without_one_are_left_out():
    rows = [
        {"association_errors": [2.0, None]},
        {"association_errors": [9.0, None]},
        {"association_errors": [1.0, None]},
    ]
    (found,) = layer_errors(rows, ["x", "y"])
    assert (found.layer, found.first, found.last) == ("x", 2.0, 1.0)
    assert error_words([found]) == "From the first to the last logging window the errors changed by -50%."


def test_what_was_not_logged_is_not_drawn():
    rows = [
        {"step": 1, "loss": math.nan},
        {"loss": 1.0},
        {"step": 2, "task_loss": "much"},
        {"step": True, "loss": 1.0},
    ]
    assert loss_curves(rows) == () and association_history(rows, [], []) is None and layer_errors(rows, []) == ()


def test_encoder_decoder_and_teachers_stand_apart():
    names = ["teachers.0.encoder.block.1", "teachers.0.decoder.block.1", "teachers.1.4"]
    assert [(group.title, group.places) for group in teacher_groups(names)] == [
        ("teacher 0", (0, 1)),
        ("teacher 1", (2,)),
    ]
    assert [group.title for group in side_groups(names[:2])] == ["encoder", "decoder"]
    assert [group.title for group in side_groups(["encoder.1", "encoder.2"])] == [""]
    assert short_names(["vit.layer.1.out", "vit.layer.12.out"]) == ["1", "12"] and short_names(["a.b"]) == ["a.b"]
    history = association(("encoder.0", "decoder.0"), ("encoder.0", "encoder.1", "decoder.0"))
    maps = heat_maps(history)
    assert (
        len(maps) == 8
        and maps[0].heads == (("encoder", 2), ("decoder", 1))
        and maps[0].columns == ("0", "1", "decoder.0")
    )


def test_charts_lie_between_their_axes():
    chart = line_chart("loss", [("training", "train", Curve("loss", (10, 20, 30), (4.0, 2.0, 0.0)))], high=4.0)
    assert chart.lines[0].points == "0.00,0.00 50.00,50.00 100.00,100.00"
    assert [(tick.at, tick.label) for tick in chart.y] == [(100, "0"), (75, "1"), (50, "2"), (25, "3"), (0, "4")]
    assert ticks(0, 1.05) == [0, 0.5, 1.0] and ticks(3, 4) == pytest.approx([3, 3.5, 4])


# ---- The page and its data ---------------------------------------------------------------------------------------


def test_a_report_comes_back_from_its_data_and_gives_the_same_page(tmp_path):
    report = whole()
    page = report.save(tmp_path)
    loaded = DistillationReport.load(tmp_path / "report.json")
    assert loaded == report and page == tmp_path / "report.html"
    assert loaded.page() == page.read_text(encoding="utf-8")


def test_hostile_texts_are_escaped_and_nothing_is_loaded():
    page = whole(HOSTILE).page()
    assert "<script" not in page and "&lt;script&gt;" in page and "{{ 7*7 }}" in page and ">49<" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:image/png;base64,)", page)
    assert "default-src 'none'" in page


def test_parts_that_are_missing_are_explained():
    page = DistillationReport(Run("SemCKD", "student", "teacher"), missing={"deploy": "Not <measured>."}).page()
    assert "Not &lt;measured&gt;." in page and "<table" not in page
    assert "Missing, deploy: Not <measured>." in str(
        DistillationReport(Run("a", "b", "c"), missing={"deploy": "Not <measured>."})
    )


def changed(place, value):
    """Return the whole report as JSON with a value put into a place of it."""

    def change(folder):
        whole().save(folder)
        data = json.loads((folder / "report.json").read_text())
        *path, last = place
        part = data
        for key in path:
            part = part[key]
        part[last] = value
        return json.dumps(data)

    return change


@pytest.mark.parametrize(
    "content",
    [
        lambda _: "",
        lambda _: "[" * 100_000,
        lambda _: "[]",
        lambda _: "{}",
        lambda _: '{"run": null}',
        changed(["run", "method"], 3),
        changed(["deploy", "rows"], []),
        changed(["deploy", "rows", 0, "latency"], []),
        changed(["deploy", "rows", 0, "latency", 0, "p50"], 0),
        changed(["deploy", "rows", 0, "latency", 0, "p50"], None),
        changed(["deploy", "rows", 0, "parameters"], 10**30),
        changed(["deploy", "rows", 0, "quality"], "much"),
        changed(["losses", 0, "values"], [1.0]),
        changed(["losses", 0, "values", 0], None),
        changed(["losses", 0, "steps", 0], -1),
        changed(["association", "maps"], []),
        changed(["association", "maps", 0, "weights"], [[1.0]]),
        changed(["association", "maps", 0, "weights", 0, 0], 7),
        changed(["association", "student_layers"], []),
        changed(["comparison", "examples", 0, "picture"], "https://example.com/x.png"),
        changed(["comparison", "examples", 0, "picture"], "data:image/svg+xml;base64,AAAA"),
        changed(["comparison", "reliability", 0, "bins"], {"count": 1}),
        changed(["missing"], ["deploy"]),
    ],
)
def test_a_hostile_file_is_refused_with_its_place(content, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(content(tmp_path))
    with pytest.raises(InputError):
        DistillationReport.load(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["comparison", "quality"], {}),
        (["comparison", "agreement"], None),
        (["comparison", "examples"], []),
        (["comparison", "reliability"], []),
        (["comparison", "reliability", 0, "bins"], []),
        (["deploy", "rows", 1, "kept", "value"], None),
        (["deploy", "rows", 1, "agreement"], None),
        (["losses"], []),
        (["association", "entropy"], None),
        (["association", "entropy", "values"], [1e18, -1e18]),
        (["losses", 0, "values"], [1e18, 1e-300, 0]),
        (["losses", 0, "steps"], [9, 9, 9]),
        (["layer_errors"], [{"layer": "x", "first": 0, "last": 0}]),
        (["run", "settings"], []),
        (["run", "student"], "\ud800"),
        (["unknown"], 1),
    ],
)
def test_what_is_odd_but_possible_has_a_page(place, value, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(changed(place, value)(tmp_path))
    report = DistillationReport.load(path)
    assert "</html>" in report.save(tmp_path).read_text() and str(report)


def test_a_table_needs_a_row():
    with pytest.raises(InputError, match="deploy table"):
        DeployTable((), "accuracy", True, 1)
