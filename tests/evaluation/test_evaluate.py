"""Models side by side: the numbers are those of Trainer, of the files and of the models; nothing is changed."""

import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from makers import bert, images, plain_arguments, resnet, texts, traces, vit, weights
from matrix.tasks import TASKS
from transformers import Trainer

from hf_semckd import evaluate
from hf_semckd.errors import InputError, MissingDependencyError
from hf_semckd.evaluation import evaluate as module
from hf_semckd.evaluation import variants

QUICK = {"onnx": False, "memory": False, "seconds": 0.0}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_quality_is_that_of_trainer_and_the_models_stay_as_they_are(tmp_path):
    models, data = {"teacher": vit(3, 24, seed=4), "student": resnet(seed=5).train()}, images(37)
    before = {name: (weights(model), traces(model), model.training) for name, model in models.items()}
    found = evaluate(models, data, **QUICK)
    assert found.metric == "accuracy" and found.samples == 37
    for name, model in models.items():
        own = weights(model)
        assert all(torch.equal(own[key], value) for key, value in before[name][0].items())
        assert (traces(model), model.training) == before[name][1:]
        trainer = Trainer(model, plain_arguments(tmp_path), eval_dataset=data, compute_metrics=accuracy)
        assert found.row(name).quality == pytest.approx(trainer.evaluate()["eval_accuracy"])
        assert found.row(name).parameters == sum(entry.numel() for entry in model.parameters())
    student, teacher = found.row("student"), found.row("teacher")
    assert student.kept.value == pytest.approx(student.quality / teacher.quality)
    assert teacher.agreement == teacher.kept.low == teacher.kept.high == 1.0


def test_size_is_that_of_the_saved_model_and_times_are_for_the_asked_batches(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path)
    found = evaluate({"student": tmp_path}, texts(5), latency_batches=(2, 8), **QUICK)
    row = found.rows[0]
    assert row.disk_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert [entry.samples for entry in row.latency] == [2, 8]
    assert all(0 < entry.p50 <= entry.p95 for entry in row.latency)
    assert row.latency[1].throughput == pytest.approx(8000 / row.latency[1].p50)
    assert found.shapes[8]["input_ids"][0] == 8  # of five samples


def test_the_reference_reads_its_own_columns():
    rows = texts(12)
    data = [{**rows[n], "teacher_input_ids": rows[n]["input_ids"].roll(1)} for n in range(12)]
    data = [{key: value for key, value in row.items() if key != "token_type_ids"} for row in data]
    teacher = bert(seed=3)
    found = evaluate({"teacher": teacher, "student": bert(seed=4)}, data, **QUICK)
    with torch.no_grad():
        own = torch.stack([row["teacher_input_ids"] for row in data])
        expected = teacher.eval()(own).logits.argmax(-1)
    right = (expected == torch.stack([row["labels"] for row in data])).float().mean()
    assert found.rows[0].quality == pytest.approx(float(right))


@pytest.mark.parametrize("name", ["token-classification", "question-answering", "seq2seq-labels", "segmentation"])
def test_other_tasks_are_evaluated(name):
    task = TASKS[name]
    student = task.student_model()
    collator = task.collator and task.collator(student)
    models = {"teacher": task.teacher_model(), "student": student}
    found = evaluate(models, task.rows(), data_collator=collator, latency_batches=(1,), **QUICK)
    assert len(found.rows) == 2 and 0 <= found.rows[1].agreement <= 1


def test_what_is_printed_and_saved(tmp_path):
    found = evaluate({"teacher": vit(3), "student": vit(1)}, images(9), **QUICK)
    said = str(found)
    assert "kept (95 %)" in said and "9 samples" in said and "ms for 32" in said
    found.save(tmp_path)
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["model"] for row in saved["rows"]] == ["teacher", "student"]
    assert saved["rows"][1]["kept"]["value"] == pytest.approx(found.rows[1].kept.value)
    assert (tmp_path / "evaluation.txt").read_text().strip() == said
    assert (tmp_path / "evaluation.png").read_bytes()[:4] == b"\x89PNG"


def test_without_the_packages_a_note_says_what_to_install(monkeypatch):
    monkeypatch.setattr(variants, "is_installed", lambda name: False)
    found = evaluate({"student": vit(1)}, images(4), memory=False, seconds=0.0)
    assert "hf-semckd[onnx]" in found.notes[0] and len(found.rows) == 1
    monkeypatch.setattr(module, "check_installed", lambda: (_ for _ in ()).throw(MissingDependencyError("none")))
    with pytest.raises(MissingDependencyError):
        evaluate({"student": vit(1)}, images(4), onnx=True)


@pytest.mark.slow
def test_files_for_deployment_say_the_same_and_every_form_is_measured():
    found = evaluate({"teacher": bert(3, 32), "student": bert(1, 32)}, texts(40), seconds=0.1)
    assert [(row.model, row.runtime) for row in found.rows if row.device == "cpu"] == [
        (model, runtime) for model in ("teacher", "student") for runtime in ("PyTorch", "ONNX", "ONNX int8")
    ]
    for model in ("teacher", "student"):
        plain, onnx, int8 = (found.row(model, runtime) for runtime in ("PyTorch", "ONNX", "ONNX int8"))
        assert onnx.quality == plain.quality and onnx.calibration_error == pytest.approx(
            plain.calibration_error, abs=1e-4
        )
        assert int8.disk_bytes < onnx.disk_bytes
        # A process with PyTorch in it needs more than one with ONNX Runtime alone.
        assert plain.peak_bytes > onnx.peak_bytes > onnx.disk_bytes


@pytest.mark.parametrize(("models", "data"), [({}, images(4)), ({"a": vit()}, images(4, labels=None))])
def test_what_cannot_be_evaluated_is_refused(models, data):
    with pytest.raises(InputError, match="(?s)(nothing to evaluate|has no labels).*what to do"):
        evaluate(models, data, **QUICK)


@pytest.mark.parametrize("data", [DatasetDict(test=Dataset.from_dict({"labels": [0]})), iter([{"labels": 0}])])
def test_what_is_no_split_is_refused(data):
    with pytest.raises(InputError, match=r"(?s)no samples with an index.*data\['test'\]"):
        evaluate({"a": vit()}, data, **QUICK)


def test_an_empty_data_set_is_refused():
    with pytest.raises(InputError, match="(?s)nothing to evaluate.*1 models and 0 samples"):
        evaluate({"a": vit()}, [], **QUICK)
