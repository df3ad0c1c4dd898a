"""Where rows come from, and which of them are trained on, evaluated on and left for the table."""

import json

import datasets
import numpy as np
import pytest
import soundfile
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

from hf_semckd.errors import ConfigurationError, InputError, SourceError
from hf_semckd.recipes.schema import DataOptions
from hf_semckd.recipes.sources import load_rows, load_splits, numbered_alike


def rows(count, start=0):
    return [{"text": f"row {place}", "label": place % 2} for place in range(start, start + count)]


def saved(folder, **splits):
    """Save splits as `save_to_disk` does, each given by its rows."""
    DatasetDict({name: Dataset.from_list(found) for name, found in splits.items()}).save_to_disk(folder)
    return str(folder)


def texts(split):
    return list(split["text"])


# ---- Formats ---------------------------------------------------------------------------------------------------


def write_csv(path, sign=","):
    path.write_text("\n".join([f"text{sign}label", *(f"{row['text']}{sign}{row['label']}" for row in rows(4))]))


def write_json(path):
    path.write_text("\n".join(map(json.dumps, rows(4))))


WRITERS = {
    "csv": write_csv,
    "tsv": lambda path: write_csv(path, "\t"),
    "json": lambda path: path.write_text(json.dumps(rows(4))),
    "jsonl": write_json,
    "parquet": lambda path: Dataset.from_list(rows(4)).to_parquet(path),
}


@pytest.mark.parametrize("suffix", [*WRITERS, "CSV"])
def test_a_file_is_read_by_its_suffix(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    WRITERS[suffix.lower()](path)
    found = load_rows(str(path))
    assert list(found) == ["train"] and found["train"].to_list() == rows(4)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_folder_of_files_has_a_split_for_each(tmp_path, suffix):
    for name in ("train", "test"):
        WRITERS[suffix](tmp_path / f"{name}.{suffix}")
    found = load_rows(str(tmp_path))
    assert {name: split.to_list() for name, split in found.items()} == {"train": rows(4), "test": rows(4)}


def test_texts_are_read_by_paragraph_from_a_file_or_a_folder(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("first\nline\n\nsecond")
    (tmp_path / "texts" / "two.txt").write_text("third")
    assert texts(load_rows(str(tmp_path / "texts" / "one.txt"))["train"]) == ["first\nline", "second"]
    assert sorted(texts(load_rows(str(tmp_path / "texts"))["train"])) == ["first\nline", "second", "third"]


def test_what_was_saved_to_disk_is_loaded_with_or_without_splits(tmp_path):
    both = load_rows(saved(tmp_path / "both", train=rows(4), odd=rows(2)))
    assert {name: len(split) for name, split in both.items()} == {"train": 4, "odd": 2}
    Dataset.from_list(rows(3)).save_to_disk(tmp_path / "one")
    assert load_rows(str(tmp_path / "one"))["train"].to_list() == rows(3)


def test_images_by_class_are_read_with_their_classes(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("L", (4, 4), 7).save(tmp_path / split / name / "a.png")
    found = load_rows(str(tmp_path))
    assert found["test"].features["label"].names == ["cat", "dog"]
    assert [row["label"] for row in found["train"]] == [0, 1] and found["train"][0]["image"].size == (4, 4)


@pytest.mark.parametrize("splits", [("train", "test"), ("",)], ids=["with splits", "without"])
def test_sounds_by_class_are_read_with_their_classes(tmp_path, splits):
    for split in splits:
        for name in ("hum", "beep"):
            (tmp_path / split / name).mkdir(parents=True)
            soundfile.write(tmp_path / split / name / "a.wav", np.zeros(8), 8000)
    found = load_rows(str(tmp_path))
    assert set(found) == ({*splits} - {""} or {"train"})
    assert found["train"].features["label"].names == ["beep", "hum"]
    assert [row["label"] for row in found["train"]] == [0, 1]
    assert found["train"][1]["audio"]["path"].endswith("a.wav")


# ---- Splits ----------------------------------------------------------------------------------------------------


def split_sizes(found):
    return len(found.train), len(found.validation), len(found.test)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("validation",), ("validation", "validation")),
        (("dev",), ("dev", "dev")),
        (("test",), ("test", "test")),
        (("validation", "test"), ("validation", "test")),
        (("odd",), (None, "train (held out)")),
    ],
)
def test_splits_are_found_by_their_names(tmp_path, names, expected):
    places = {name: 100 * (place + 1) for place, name in enumerate(names)}
    folder = saved(tmp_path, train=rows(30), **{name: rows(5, start) for name, start in places.items()})
    found = load_splits(DataOptions(dataset=folder))
    validation, table = expected
    assert found.test_name == table
    if validation is None:
        assert split_sizes(found) == (27, 3, 3)
    else:
        assert texts(found.validation) == [row["text"] for row in rows(5, places[validation])]
        assert texts(found.test) == [row["text"] for row in rows(5, places[table])]
        assert len(found.train) == 30
    assert (found.test is found.validation) == (len(names) == 1)


def test_splits_that_are_named_are_taken(tmp_path):
    folder = saved(tmp_path, train=rows(4), a=rows(5, 10), b=rows(6, 20), validation=rows(7, 30))
    found = load_splits(DataOptions(dataset=folder, train_split="a", eval_split="b", test_split="train"))
    assert split_sizes(found) == (5, 6, 4) and found.test_name == "train"
    found = load_splits(DataOptions(dataset=folder, eval_split="b"))
    assert split_sizes(found) == (4, 6, 6) and found.test_name == "b"


@pytest.mark.parametrize("train", ["validation", "test"])
def test_rows_to_train_on_are_never_those_to_evaluate_on(tmp_path, train):
    folder = saved(tmp_path, **{train: rows(20)})
    found = load_splits(DataOptions(dataset=folder, train_split=train))
    assert not {*texts(found.train)} & ({*texts(found.validation)} | {*texts(found.test)})
    assert len(found.train) + len(found.validation) == 20


def test_what_is_held_out_is_a_tenth_and_the_same_every_time(tmp_path):
    folder = saved(tmp_path, train=rows(50))
    first, again = (load_splits(DataOptions(dataset=folder)) for _ in range(2))
    assert split_sizes(first) == (45, 5, 5)
    assert texts(first.train) == texts(again.train) and texts(first.validation) == texts(again.validation)
    assert sorted(texts(first.train) + texts(first.validation)) == sorted(row["text"] for row in rows(50))
    assert texts(first.validation) != [row["text"] for row in rows(5)]
    with pytest.raises(InputError, match="(?s)too few rows.*1 rows"):
        load_splits(DataOptions(dataset=saved(tmp_path / "one", train=rows(1))))


def test_fewer_rows_are_chosen_at_random_and_the_same_every_time(tmp_path):
    folder = saved(tmp_path, train=rows(50), test=rows(20, 100))
    options = DataOptions(dataset=folder, max_train_samples=9, max_eval_samples=6)
    first, again = load_splits(options), load_splits(options)
    assert split_sizes(first) == (9, 6, 6) and first.test is first.validation
    assert texts(first.train) == texts(again.train) and texts(first.test) == texts(again.test)
    assert texts(first.train) != [row["text"] for row in rows(9)] and len({*texts(first.train)}) == 9
    more = load_splits(DataOptions(dataset=folder, max_train_samples=500, max_eval_samples=20))
    assert texts(more.train) == [row["text"] for row in rows(50)] and len(more.test) == 20


LABEL = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})


def test_a_split_whose_labels_are_hidden_is_not_evaluated_on(tmp_path):
    hidden = [{**row, "label": -1} for row in rows(5)]
    splits = {"train": rows(20), "validation": rows(6), "test": hidden}
    DatasetDict({name: Dataset.from_list(found, LABEL) for name, found in splits.items()}).save_to_disk(tmp_path / "a")
    assert load_splits(DataOptions(dataset=str(tmp_path / "a"))).test_name == "validation"
    bare = [{"text": row["text"]} for row in rows(5)]
    assert load_splits(DataOptions(dataset=saved(tmp_path / "b", train=rows(20), test=bare))).test_name == (
        "train (held out)"
    )


# ---- Another data set to evaluate on -------------------------------------------------------------------------------


def test_another_data_set_is_evaluated_on_and_nothing_is_held_out(tmp_path):
    folder, other = saved(tmp_path / "a", train=rows(20), test=rows(5, 50)), tmp_path / "other.jsonl"
    other.write_text("\n".join(map(json.dumps, rows(4, 100))))
    found = load_splits(DataOptions(dataset=folder, eval_dataset=str(other)))
    assert split_sizes(found) == (20, 4, 4) and texts(found.test) == [row["text"] for row in rows(4, 100)]


def test_another_data_set_that_cannot_be_evaluated_on_is_refused(tmp_path):
    folder = saved(tmp_path / "a", train=rows(20))
    for place, splits in enumerate(({"x": rows(3), "y": rows(3)}, {"test": [{"text": "a"}]})):
        other = saved(tmp_path / f"other{place}", **splits)
        with pytest.raises(InputError, match="(?s)no split that can be used.*eval_split"):
            load_splits(DataOptions(dataset=folder, eval_dataset=other))
    named = load_splits(DataOptions(dataset=folder, eval_dataset=str(tmp_path / "other0"), eval_split="y"))
    assert split_sizes(named) == (20, 3, 3)


def labeled(names, labels):
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"text": [f"{place}" for place in labels], "label": labels}, features)


def test_classes_of_another_data_set_are_numbered_as_those_to_train_on():
    train = labeled(["ant", "bee", "cow"], [0, 1, 2])
    found = numbered_alike(train, labeled(["cow", "ant"], [0, 1, -1, 0]))
    assert list(found["label"]) == [2, 0, -1, 2] and texts(found) == ["0", "1", "-1", "0"]
    assert found.features["label"] == train.features["label"]
    with pytest.raises(InputError, match="(?s)classes that those to train on lack.*received: dog"):
        numbered_alike(train, labeled(["dog", "ant"], [0, 1]))


def test_tags_of_another_data_set_are_numbered_too():
    def tagged(names, tags):
        features = Features({"place": Value("int64"), "tags": datasets.List(ClassLabel(names=names))})
        return Dataset.from_dict({"place": list(range(len(tags))), "tags": tags}, features)

    found = numbered_alike(tagged(["O", "B", "I"], [[0, 1, 2]]), tagged(["B", "O"], [[0, 1], [], [1]]))
    assert list(found["tags"]) == [[1, 0], [], [0]]


# ---- Refusals --------------------------------------------------------------------------------------------------


def test_a_name_that_is_not_there_is_refused_with_the_near_one(tmp_path):
    (tmp_path / "reviews.csv").write_text("text,label\na,1\n")
    with pytest.raises(SourceError, match=r"(?s)no such file or folder here \(is it .*reviews\.csv\?\)"):
        load_rows(str(tmp_path / "review.csv"))
    with pytest.raises(SourceError, match="(?s)could not be loaded.*nobody/nothing"):
        load_rows("nobody/nothing")


@pytest.mark.parametrize("name", ["rows.xlsx", "rows"])
def test_a_file_of_an_unknown_kind_is_refused(tmp_path, name):
    (tmp_path / name).write_text("a")
    with pytest.raises(InputError, match=r"(?s)unknown kind.*\.csv"):
        load_rows(str(tmp_path / name))


@pytest.mark.parametrize(("name", "content"), [("a.json", "{"), ("a.parquet", "x"), ("a.csv", "")])
def test_a_damaged_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match="could not be loaded"):
        load_rows(str(tmp_path / name))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(SourceError, match="could not be loaded"):
        load_rows(str(tmp_path))


@pytest.mark.parametrize("option", ["train_split", "eval_split", "test_split"])
def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path, option):
    folder = saved(tmp_path, train=rows(4), test=rows(4))
    with pytest.raises(ConfigurationError, match=f"(?s){option}=tset.*one of train, test"):
        load_splits(DataOptions(dataset=folder, **{option: "tset"}))
