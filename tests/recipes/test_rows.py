"""What is read of the rows before any model is loaded, and what is said of it."""

import io

import pytest
from recipe_parts import KINDS, read, save_bert, sentences, write_rows
from transformers import BertModel

from hf_semckd.errors import ConfigurationError, SourceError
from hf_semckd.recipes.progress import Voice
from hf_semckd.recipes.rows import read_rows


def rows_of(teacher, data, *flags):
    heard = io.StringIO()
    reading = read("--teacher", teacher, "--dataset", data, "--num_layers", 1, *flags)
    return read_rows(reading.recipe, Voice(stream=heard)), heard.getvalue()


def test_rows_columns_and_classes_are_told(teacher, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [*sentences(30), {"text": None, "label": "bad"}])
    found, heard = rows_of(teacher, data)
    assert (found.kind.name, found.columns.all) == ("text-classification", ("text", "label"))
    # In the order of the teacher, not of the alphabet.
    assert found.classes.names == KINDS
    assert f"data      {data}: " in heard and "of train (held out) for the table" in heard
    assert "text-classification: text -> label, 3 classes (good, bad, odd); 1 rows without" in heard


def test_classes_are_the_datas_own_where_the_teacher_learns_them(tmp_path, teacher):
    data = write_rows(tmp_path / "rows.jsonl", sentences(30))
    own = tuple(sorted(KINDS))
    assert rows_of(teacher, data, "--teacher_epochs", 1)[0].classes.names == own
    bare = save_bert(tmp_path / "bare", head=BertModel)
    assert rows_of(bare, data, "--task", "text-classification")[0].classes.names == own


def test_two_splits_to_evaluate_on_are_both_told(tmp_path, teacher):
    for name, count in (("train", 12), ("validation", 3), ("test", 6)):
        write_rows(tmp_path / "data" / f"{name}.jsonl", sentences(count))
    _, heard = rows_of(teacher, tmp_path / "data")
    assert "12 to train on, 6 of test for the table, 3 to evaluate on while training" in heard


def test_mistakes_come_before_any_model_is_loaded(tmp_path, teacher):
    data = write_rows(tmp_path / "rows.jsonl", sentences(30))
    with pytest.raises(SourceError, match="teacher could not be loaded"):
        rows_of(tmp_path / "none", data)
    with pytest.raises(ConfigurationError, match="(?s)does not have this column.*lable"):
        rows_of(teacher, data, "--label_column", "lable")
    with pytest.raises(ConfigurationError, match="(?s)Which class.*is not known"):
        rows_of(save_bert(tmp_path / "other", names=("x", "y", "z")), data)
