"""`make-student`, `evaluate` and `export`: from a saved teacher to files, without Python."""

import json

import pytest
from datasets import Dataset, DatasetDict
from makers import images, vit
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_semckd.cli import main
from hf_semckd.publishing.sources import hub_source, source_of


@pytest.fixture
def folder(tmp_path):
    vit(4, 24, seed=9).save_pretrained(tmp_path / "teacher")
    rows = [
        {"pixel_values": row["pixel_values"].tolist(), "labels": row["labels"], "name": "not for a model"}
        for row in images(9).rows
    ]
    data = Dataset.from_list(rows)
    DatasetDict(train=data, test=data).save_to_disk(tmp_path / "data")
    return tmp_path


def run(*words):
    return main([str(word) for word in words])


def test_a_student_is_made_and_evaluated(folder, capsys):
    (folder / "teacher" / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    assert run("make-student", folder / "teacher", folder / "student", "--num-layers", 2) == 0
    assert "num_hidden_layers  4        2" in capsys.readouterr().out
    assert AutoModelForImageClassification.from_pretrained(folder / "student").config.num_hidden_layers == 2
    assert AutoImageProcessor.from_pretrained(folder / "student")
    models = (f"teacher={folder / 'teacher'}", f"student={folder / 'student'}")
    words = ("evaluate", *models, "--dataset", folder / "data", "--no-onnx", "--no-memory", "--samples", 5)
    assert run(*words, "--output", folder / "report") == 0
    assert "5 samples" in capsys.readouterr().out and (folder / "report" / "evaluation.json").is_file()
    assert run(*words, "--json") == 0
    assert [row["model"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["teacher", "student"]


def test_a_student_s_folder_tells_what_it_starts_from(folder):
    def made(*words):
        target = folder / f"student{len(words)}"
        assert run("make-student", folder / "teacher", target, "--num-layers", 1, *words) == 0
        return AutoModelForImageClassification.from_pretrained(target)

    (folder / "teacher" / "README.md").write_text("---\nbase_model: google/vit-1\nlicense: gemma\n---\n")
    student = made()
    assert hub_source(student) == "google/vit-1" and source_of(student).license == "gemma"
    assert hub_source(made("--init", "random")) is None


def test_a_model_is_not_written_over(folder, capsys):
    vit(2, 16).save_pretrained(folder / "trained")
    before = (folder / "trained" / "model.safetensors").read_bytes()
    assert run("make-student", folder / "teacher", folder / "trained", "--num-layers", 2) == 2
    assert "a model in this folder already" in capsys.readouterr().err
    assert (folder / "trained" / "model.safetensors").read_bytes() == before


def test_a_budget_of_time_takes_samples_from_the_data(folder, capsys):
    words = ("make-student", folder / "teacher", folder / "student", "--latency-ms", 1e6)
    assert run(*words) == 2
    assert "batch" in capsys.readouterr().err
    assert run(*words, "--dataset", folder / "data", "--batch-size", 2) == 0


@pytest.mark.slow
def test_a_model_is_exported(folder, capsys):
    assert run("export", folder / "teacher", folder / "onnx", "--int8") == 0
    out = capsys.readouterr().out
    assert "model.onnx" in out and "model_int8.onnx" in out and (folder / "onnx" / "model_int8.onnx").is_file()


def test_what_cannot_work_is_one_message(folder, capsys):
    assert run("evaluate", folder / "teacher", "--dataset", folder / "data") == 2
    assert "NAME=MODEL" in capsys.readouterr().err
    assert run("export", folder / "nowhere", folder / "onnx") == 2
    assert "could not be loaded" in capsys.readouterr().err


def test_nothing_that_is_read_or_no_folder_is_written_over(folder, capsys):
    (folder / "file").touch()
    before = (folder / "teacher" / "model.safetensors").read_bytes()
    for target in ("teacher", "file"):
        assert run("make-student", folder / "teacher", folder / target, "--num-layers", 1) == 2
        assert "Nothing can be written there" in capsys.readouterr().err
    assert (folder / "teacher" / "model.safetensors").read_bytes() == before
    models = (f"a={folder / 'teacher'}", f"a={folder / 'teacher'}")
    assert run("evaluate", *models, "--dataset", folder / "data") == 2
    assert "Two models have one name" in capsys.readouterr().err
