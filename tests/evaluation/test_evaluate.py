"""Models side by side: the numbers are those of Trainer, of the files and of the models; nothing is changed."""

import copy
import json
from functools import partial

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, dispatch_model
from datasets import Dataset, DatasetDict
from makers import bert, bert_tokens, distiller, images, plain_arguments, resnet, texts, traces, vit, weights
from matrix.tasks import TASKS, tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import DataCollatorForLanguageModeling, Trainer

from hf_semckd import evaluate, export_onnx
from hf_semckd.errors import ConfigurationError, InputError, MissingDependencyError
from hf_semckd.evaluation import evaluate as module
from hf_semckd.evaluation import variants
from hf_semckd.teacher.placement import placement_of

QUICK = {"onnx": False, "memory": False, "seconds": 0.0}


@pytest.fixture
def one_process_group(tmp_path):
    """A group of this process alone: what is sharded over it is a DTensor as with many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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
    assert "kept (95%)" in said and "9 samples" in said and "ms for 32" in said
    narrow = found.text(80)
    assert max(map(len, narrow.splitlines()[:12])) <= 80 < max(map(len, said.splitlines()))
    assert narrow.splitlines()[0].split() == ["model", "teacher", "student"]
    assert sorted(narrow.split()) == sorted(said.split())
    found.save(tmp_path)
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["model"] for row in saved["rows"]] == ["teacher", "student"]
    assert saved["rows"][1]["kept"]["value"] == pytest.approx(found.rows[1].kept.value)
    assert (tmp_path / "evaluation.txt").read_text().strip() == said
    assert (tmp_path / "evaluation.png").read_bytes()[:4] == b"\x89PNG"


def test_a_student_that_is_always_wrong_is_drawn_too(tmp_path):
    student = vit(1)
    with torch.no_grad():
        student.classifier.weight.zero_()
        student.classifier.bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
    data = [row for row in images(30).rows if row["labels"] != 2]
    found = evaluate({"teacher": vit(3), "student": student}, data, **QUICK)
    assert found.row("student").quality == found.row("student").kept.value == 0
    assert (found.save(tmp_path) / "evaluation.png").is_file()


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


def test_every_row_sees_the_same_draw_of_random_data_and_randomness_stays():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            return {"pixel_values": torch.randn(3, 16, 16), "labels": index % 3}

    model, state = vit(2), torch.get_rng_state()
    found = evaluate({"a": model, "b": model}, Noisy(), **QUICK)
    assert found.row("b").agreement == 1.0 and found.row("b").kept.value == pytest.approx(1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_masks_may_be_drawn_by_the_collator():
    task = TASKS["masked-lm"]
    student = task.student_model()
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.4)
    rows = [{"input_ids": row["input_ids"]} for row in task.rows()]
    found = evaluate({"teacher": task.teacher_model(), "student": student}, rows, data_collator=collator, **QUICK)
    assert found.metric == "perplexity"


def test_labels_are_those_of_the_last_model_by_name():
    names = ["cat", "dog", "bird"]
    student = bert()
    student.config.id2label = dict(enumerate(names))
    teacher, order = copy.deepcopy(student), [2, 0, 1]
    teacher.config.id2label = {place: names[k] for place, k in enumerate(order)}
    with torch.no_grad():
        teacher.classifier.weight.copy_(student.classifier.weight[order])
        teacher.classifier.bias.copy_(student.classifier.bias[order])
    found = evaluate({"teacher": teacher, "student": student}, texts(20), **QUICK)
    assert found.row("student").agreement == 1.0 and found.row("teacher").quality == found.row("student").quality
    teacher.config.id2label = {0: "cat", 1: "dog", 2: "fish"}
    with pytest.raises(InputError, match="(?s)name their labels differently"):
        evaluate({"teacher": teacher, "student": student}, texts(4), **QUICK)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_evaluated(kind):
    assert evaluate({"a": vit(1).to(kind)}, images(6), **QUICK).rows[0].disk_bytes > 0


def test_configurations_and_the_modes_of_parts_stay():
    model = bert().train()
    model.bert.embeddings.eval()
    before = model.config.to_dict()
    evaluate({"a": model}, texts(4), **QUICK)
    assert model.config.to_dict() == before and model.training and not model.bert.embeddings.training


def test_a_model_without_its_head_is_refused(tmp_path):
    bert().bert.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(InputError, match="(?s)'student' would have random weights"):
        evaluate({"student": tmp_path}, texts(4), **QUICK)


@pytest.mark.parametrize("counts", [{"batch_size": 0}, {"latency_batches": ()}, {"latency_batches": (0,)}])
def test_batches_of_no_sample_are_refused(counts):
    with pytest.raises(ConfigurationError, match="at least one sample"):
        evaluate({"a": vit()}, images(4), **{**QUICK, **counts})


def test_models_of_different_tasks_are_refused():
    with pytest.raises(InputError, match="(?s)different tasks.*|do not correspond"):
        evaluate({"a": bert_tokens(), "b": bert()}, texts(4), **QUICK)


@pytest.mark.parametrize("data", [DatasetDict(test=Dataset.from_dict({"labels": [0]})), iter([{"labels": 0}])])
def test_what_is_no_split_is_refused(data):
    with pytest.raises(InputError, match=r"(?s)no samples with an index.*data\['test'\]"):
        evaluate({"a": vit()}, data, **QUICK)


def test_an_empty_data_set_is_refused():
    with pytest.raises(InputError, match="(?s)nothing to evaluate.*and 0 samples"):
        evaluate({"a": vit()}, [], **QUICK)


# ---- Models that are not whole in one place -------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["device_map", "offload"])
def test_a_placed_teacher_is_evaluated_where_it_is_and_teaches_on(placement, tmp_path):
    teacher, data = vit(3, 24, seed=4), images(19)
    expected = evaluate({"teacher": teacher, "student": resnet(seed=5)}, data, **QUICK)
    how = {"teacher_placement": placement, "max_steps": 2}
    trainer = distiller(tmp_path, how, model=resnet(seed=5), teacher_model=teacher, train_dataset=data)
    for _ in range(2):
        trainer.train()
        found = evaluate({"teacher": teacher, "student": resnet(seed=5)}, data, **QUICK)
        for name in ("quality", "agreement", "calibration_error", "parameters", "device"):
            for model in ("teacher", "student"):
                assert getattr(found.row(model), name) == pytest.approx(getattr(expected.row(model), name)), name
    # What is on one device, such as this machine's only one, is whole.
    sizes = {"device_map": expected.row("teacher").disk_bytes, "offload": None}
    assert found.row("teacher").disk_bytes == sizes[placement] and found.row("student").disk_bytes > 0
    report = trainer.distillation_report(dataset=data)
    assert report.comparison.quality["teacher"] == pytest.approx(expected.row("teacher").quality)
    assert placement_of(teacher) == placement


@pytest.mark.parametrize("spread", [cpu_offload, partial(dispatch_model, device_map={"": "cpu"}, force_hooks=True)])
def test_an_onnx_file_needs_the_weights_together(spread):
    teacher = spread(bert(seed=3))
    with pytest.raises(InputError, match="(?s)weights are not together.*load it anew"):
        export_onnx(teacher, "unused", {"input_ids": torch.ones(2, 4, dtype=torch.long)})
    found = evaluate({"teacher": teacher}, texts(4), memory=True, seconds=0.0)
    assert found.rows[0].peak_bytes is None and "teacher is not measured as an ONNX file" in found.notes[0]


def test_a_model_divided_among_processes_is_refused_at_once(one_process_group):
    teacher = vit()
    fully_shard(teacher, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(InputError, match="(?s)divided among processes.*sharded FSDPViT.*load it anew"):
        evaluate({"teacher": teacher, "student": vit()}, images(4), **QUICK)
