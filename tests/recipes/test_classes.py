"""What stands in a column of labels, and which output of a teacher each of them is."""

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List
from recipe_parts import KINDS, SILENT, read, save_bert, sentences, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.recipes.classes import Classes, as_by_teacher, find_classes
from hf_semckd.recipes.folder import RunFolder
from hf_semckd.recipes.prepare import prepare
from hf_semckd.recipes.rows import read_rows
from hf_semckd.recipes.sources import Splits


def column(cells, feature=None, others=()):
    """Return splits whose column `label` holds these cells, the others in the split for the table."""
    features = None if feature is None else Features({"label": feature})
    train = Dataset.from_dict({"label": cells}, features)
    return Splits(train, train, Dataset.from_dict({"label": list(others)}, features) if others else train, "test")


NAMED = ClassLabel(names=["b", "a"])


@pytest.mark.parametrize(
    ("cells", "feature", "names", "labels"),
    [
        ([1, 0, 1], NAMED, ("b", "a"), [1, 0, 1]),
        (["yes", "no", "yes"], None, ("no", "yes"), [1, 0, 1]),
        ([2, 0, 2], None, ("0", "1", "2"), [2, 0, 2]),
        ([True, False, True], None, ("0", "1"), [1, 0, 1]),
        ([2.0, 0.0, 1.0], None, ("0", "1", "2"), [2, 0, 1]),
        ([-1, 1, 0], None, ("-1", "0", "1"), [0, 2, 1]),
        ([5, 1, 3], None, ("1", "3", "5"), [2, 0, 1]),
        ([1.0, 2.0], None, ("1", "2"), [0, 1]),
        (["1", "10", "2"], None, ("1", "2", "10"), [0, 2, 1]),
        ([90001, 0], None, ("0", "90001"), [1, 0]),
    ],
)
def test_one_class_for_a_row(cells, feature, names, labels):
    found = find_classes(column(cells, feature), "label")
    assert (found.names, found.kind, found.outputs) == (names, "single", len(names))
    assert [found.encode(cell) for cell in cells] == labels
    assert found.head()["id2label"] == dict(enumerate(names))
    assert found.head()["problem_type"] == "single_label_classification"


@pytest.mark.parametrize(
    ("cells", "feature", "names", "labels"),
    [
        ([["x"], [], ["y", "x"]], None, ("x", "y"), [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]),
        ([[2, 0], [1]], None, ("0", "1", "2"), [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]),
        ([[1], [0, 1]], List(NAMED), ("b", "a"), [[0.0, 1.0], [1.0, 1.0]]),
    ],
)
def test_any_number_of_classes_for_a_row(cells, feature, names, labels):
    found = find_classes(column(cells, feature), "label")
    assert (found.names, found.kind) == (names, "multi")
    assert [found.encode(cell) for cell in cells] == labels
    assert found.head()["problem_type"] == "multi_label_classification"


def test_numbers_with_fractions_are_a_regression():
    found = find_classes(column([0.0, 2.5, 1.0]), "label")
    assert (found.kind, found.outputs, found.names) == ("regression", 1, ())
    assert found.encode(2.5) == 2.5 and found.head() == {"num_labels": 1, "problem_type": "regression"}


def test_classes_of_all_splits_count():
    assert find_classes(column(["b", "c"], others=["a"]), "label").names == ("a", "b", "c")
    assert find_classes(column([[1], [0]], others=[[3]]), "label").names == ("0", "1", "2", "3")
    tokens = find_classes(column([["B", "O"], ["O", "O"]]), "label", tokens=True)
    assert (tokens.names, tokens.kind) == (("B", "O"), "single")


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([f"id{place}" for place in range(5001)], "5001 different values"),
        ([[0, 1, 0], [1, 0, 0]], r"names a class twice.*\[0, 1, 0\]"),
        ([{"a": 1}], "does not hold classes"),
    ],
)
def test_what_are_no_classes_is_refused(cells, said):
    with pytest.raises(InputError, match=f"(?s){said}"):
        find_classes(column(cells), "label")


def test_a_label_that_is_no_class_is_refused_with_its_value():
    classes = Classes(("a", "b"), "single", ("a", "b"))
    for value in ("c", None, ["a"]):
        with pytest.raises(InputError, match="none of the classes"):
            classes.encode(value)
    with pytest.raises(InputError, match="(?s)none of the classes.*'c'"):
        Classes(("a", "b"), "multi", ("a", "b")).encode(["a", "c"])
    mixed = Splits(*(Dataset.from_dict({"label": cells}) for cells in ([0, 1], ["a"], [0])), "test")
    with pytest.raises(InputError, match="texts and numbers"):
        find_classes(mixed, "label")


# ---- A teacher's outputs -----------------------------------------------------------------------------------------


def labels_of(cells, theirs, count=None, given=None, feature=None):
    """Return what the cells become for a teacher with these names."""
    classes = find_classes(column(cells, feature), "label")
    found = as_by_teacher(classes, theirs, count or len(theirs), given)
    return [found.encode(cell) for cell in cells]


@pytest.mark.parametrize(
    ("cells", "theirs", "count", "given", "feature", "expected"),
    [
        # The same names, in another order and another case.
        (["good", "bad"], ["BAD", "Good"], None, None, None, [1, 0]),
        ([0, 1], ["A", "B"], None, None, NAMED, [1, 0]),
        # More outputs than classes.
        (["good", "bad"], ["odd", "good", "bad"], None, None, None, [1, 2]),
        ([0, 1], None, 3, None, None, [0, 1]),
        ([0, 1], None, 3, None, NAMED, [0, 1]),
        # Numbers mean the outputs of that number, whatever they are called.
        ([0, 1], ["negative", "positive"], None, None, None, [0, 1]),
        ([True, False], ["negative", "positive"], None, None, None, [1, 0]),
        ([0, 1], ["1", "0"], None, None, None, [1, 0]),
        # A recipe tells.
        (["bad", "good"], None, 2, ["good", "bad"], None, [1, 0]),
        (["bad", "good"], ["positive", "negative"], None, ["GOOD", "BAD"], None, [1, 0]),
        ([1, 5, 3], ["1 star", "2 stars", "3 stars", "4 stars", "5 stars"], None, list("12345"), None, [0, 4, 2]),
        ([-1, 1], None, 3, ["-1", "0", "1"], None, [0, 2]),
        # One output is a number.
        ([0, 1], None, 1, None, None, [0.0, 1.0]),
        ([0.5, 1.0], None, 1, None, None, [0.5, 1.0]),
    ],
)
def test_classes_are_numbered_as_the_teachers_outputs(cells, theirs, count, given, feature, expected):
    assert labels_of(cells, theirs, count, given, feature) == expected


@pytest.mark.parametrize(
    ("cells", "theirs", "count", "given", "feature"),
    [
        (["good", "bad"], None, 2, None, None),
        ([-1, 1], None, 2, None, None),
        ([1, 2, 3, 4, 5], None, 5, None, None),
        (["good", "bad"], ["positive", "negative"], None, None, None),
        ([0, 1], ["positive", "negative"], None, None, NAMED),
        ([0, 1, 2], None, 2, None, None),
        (["good", "bad"], None, 2, ["good"], None),
        (["good", "bad"], None, 2, ["good", "worse"], None),
        (["good", "bad"], None, 1, None, None),
        ([0.5, 1.0], None, 2, None, None),
    ],
)
def test_an_order_that_is_not_known_is_refused(cells, theirs, count, given, feature):
    with pytest.raises(ConfigurationError, match="(?s)is not known.*class_names"):
        labels_of(cells, theirs, count, given, feature)


def test_outputs_without_a_class_in_the_data_keep_the_teachers_names():
    found = as_by_teacher(Classes(("a", "b"), "single", ("a", "b"), numbered=False), ["B", "C", "A"], 3, None)
    assert found.names == ("B", "C", "A") and found.outputs == 3
    found = as_by_teacher(Classes(("0", "1"), "single", (0, 1)), None, 4, None)
    assert found.outputs == 4


# ---- The learned mapping ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """A teacher that plain PyTorch has taught which word is which class, named in the order of `KINDS`."""
    folder = save_bert(tmp_path_factory.mktemp("teacher"))
    model, reader = (kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    rows = sentences(30)
    batch = reader([row["text"] for row in rows], padding=True, return_tensors="pt")
    truth = torch.tensor([KINDS.index(row["label"]) for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch, labels=truth).loss.backward()
        optimizer.step()
    model.eval()
    assert (model(**batch).logits.argmax(-1) == truth).all()
    return model, reader


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_a_teacher_with_its_classes_in_any_order_is_right_about_the_samples(fine_tuned, tmp_path, order):
    model, reader = fine_tuned
    permuted = AutoModelForSequenceClassification.from_config(model.config)
    permuted.load_state_dict(model.state_dict())
    permuted.classifier.weight.data = model.classifier.weight.data[[*order]]
    permuted.classifier.bias.data = model.classifier.bias.data[[*order]]
    permuted.config.id2label = {place: KINDS[kind].upper() for place, kind in enumerate(order)}
    permuted.config.label2id = {name: place for place, name in permuted.config.id2label.items()}
    for part in (permuted, reader):
        part.save_pretrained(tmp_path / "teacher")
    data = write_rows(tmp_path / "rows.jsonl", sentences(30))
    reading = read("--teacher", tmp_path / "teacher", "--dataset", data, "--num_layers", 1, "--use_cpu", "True")
    rows = read_rows(reading.recipe, SILENT)
    prepared = prepare(reading.recipe, reading.args, RunFolder(str(tmp_path / "out")), rows, SILENT)
    samples = prepared.samples.splits.train
    batch = prepared.samples.collator([samples[place] for place in range(len(samples))])
    truth = batch.pop("labels")
    teacher = prepared.teachers[0].eval()
    assert (teacher(**batch).logits.argmax(-1) == truth).all()
    # The student's classes are the teacher's.
    assert prepared.student.config.id2label == teacher.config.id2label == permuted.config.id2label
