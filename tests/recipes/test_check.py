"""Before a training it is told how good the teacher is, and warned of one that knows nothing."""

import io
import re

import pytest
import torch
from recipe_parts import KINDS, QUICK, SILENT, read, save_bert, sentences, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_semckd.recipes.check import check_teacher
from hf_semckd.recipes.folder import RunFolder
from hf_semckd.recipes.prepare import prepare
from hf_semckd.recipes.rows import read_rows


def told(teacher, rows, folder):
    """Return what is said of a teacher, and what was prepared."""
    data = write_rows(folder / "rows.jsonl", rows)
    given = ("--teacher", teacher, "--dataset", data, "--eval_split", "train", "--num_layers", 1, *QUICK)
    reading, heard = read(*given), io.StringIO()
    prepared = prepare(
        reading.recipe, reading.args, RunFolder(str(folder / "out")), read_rows(reading.recipe, SILENT), SILENT
    )
    voice = type(SILENT)(stream=heard)
    check_teacher(prepared, 4, voice)
    return heard.getvalue()


def test_the_teachers_quality_is_that_of_its_predictions(teacher, tmp_path):
    rows = sentences(30)
    model, reader = (kind.from_pretrained(teacher) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    with torch.no_grad():
        right = sum(
            int(model.eval()(**reader(row["text"], return_tensors="pt")).logits.argmax()) == KINDS.index(row["label"])
            for row in rows
        )
    heard = told(teacher, rows, tmp_path)
    assert float(re.search(r"teacher accuracy ([\d.]+) on 30 samples", heard).group(1)) == pytest.approx(
        right / 30, abs=1e-3
    )


def test_a_teacher_that_always_says_the_same_is_warned_of(tmp_path):
    folder = save_bert(tmp_path / "teacher")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.classifier.weight.data.zero_()
    model.classifier.bias.data = torch.tensor([1.0, 0.0, 0.0])
    model.save_pretrained(folder)
    rows = sentences(30) + [{"text": "good", "label": "good"}] * 30
    heard = told(folder, rows, tmp_path)
    assert "no better than the most frequent class (67%)" in heard and "accuracy 0.6667" in heard
