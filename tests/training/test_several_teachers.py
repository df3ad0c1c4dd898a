"""Several teachers: the mean of their probabilities and of their feature losses, against numpy and single runs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from makers import LABELS, Samples, bert, bert_tokens, config, distilbert, gpt2, images, resnet, texts, vit
from paired import STUDENT, TEACHER, collator, dataset
from tiny import OrderedTrainer, arguments, assert_same, fit, outcome, pictures
from torch import nn
from transformers import AutoModelForSequenceClassification

from hf_semckd import DistillationTrainer, SemCKDTrainer, inspect_models
from hf_semckd.errors import ConfigurationError, InputError, LayerNotFoundError, TeacherOutputError
from hf_semckd.losses.regression import FitNetLoss

try:  # the one that needs no torchvision
    from transformers import ViTImageProcessorPil as ViTImageProcessor
except ImportError:  # before transformers 5.4
    from transformers import ViTImageProcessor

TERMS = ("logit_loss", "feature_loss")
# Of `teachers`.
LAYERS = [*(f"teachers.0.{n}" for n in (1, 2, 3)), *(f"teachers.1.{n}" for n in (1, 2, 3, 4))]


def teachers() -> list[Any]:
    """Return two teachers of a sentence, of other depth, width and signature."""
    return [bert(3, 24, seed=9), distilbert(4, 12, seed=7)]


def make(folder: Any, teacher: Any, kind: Any = OrderedTrainer, **args: Any) -> Any:
    """Return a trainer of a text model in float64; keywords are parts of the trainer, or arguments."""
    parts = {name: args.pop(name) for name in ("model", "train_dataset", "feature_loss") if name in args}
    given = [entry.double() if isinstance(entry, nn.Module) else entry for entry in _listed(teacher)]
    return kind(
        parts.pop("model", None) or bert().double(),
        arguments(folder, **{"association": None, "max_steps": 3, "projection_init": "random", **args}),
        teacher_model=given if isinstance(teacher, (list, tuple)) else given[0],
        **{"train_dataset": texts(12), **parts},
    )


def run(folder: Any, teacher: Any, **args: Any) -> Any:
    """Return a trainer that was trained."""
    trainer = make(folder, teacher, **args)
    fit(trainer)
    return trainer


def _listed(entry: Any) -> list[Any]:
    return list(entry) if isinstance(entry, (list, tuple)) else [entry]


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def first_terms(trainer: Any) -> dict[str, float]:
    """Return the terms of the first step."""
    return {name: trainer.state.log_history[0][name] for name in TERMS}


def test_a_list_of_one_teacher_is_that_teacher(tmp_path):
    alone, listed = (run(tmp_path, teacher) for teacher in (bert(3, 24, seed=9), [bert(3, 24, seed=9)]))
    assert_same(outcome(alone), outcome(listed), 0.0)
    assert alone.teacher_layer_names == listed.teacher_layer_names
    assert isinstance(listed.teacher, type(alone.teacher))


@pytest.mark.parametrize("init", ["zero", "random"])
def test_the_same_teacher_twice_teaches_as_it_does_once(tmp_path, init):
    alone = run(tmp_path, bert(3, 24, seed=9), projection_init=init)
    twice = run(tmp_path, [bert(3, 24, seed=9), bert(3, 24, seed=9)], projection_init=init)
    assert first_terms(twice) == pytest.approx(first_terms(alone), rel=1e-6)
    weights = twice.association()
    assert weights.shape == (2, 6)
    assert np.allclose(weights.sum(1), 1) and np.allclose(weights[:, :3], weights[:, 3:])


def test_the_target_is_the_mean_of_the_probabilities_at_the_temperature(tmp_path):
    student, data, shares = bert().double(), texts(4), np.array([0.25, 0.75])
    trainer = make(tmp_path, teachers(), model=student, train_dataset=data, max_steps=1, teacher_weights=[1.0, 3.0])
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in data.rows]) for name in data.rows[0]}
    with torch.no_grad():
        own = student.eval()(**batch).logits.numpy() / 2
        given = []
        for teacher in trainer.teacher:
            taken = ("input_ids", "attention_mask", *["token_type_ids"] * isinstance(teacher, type(student)))
            given.append(teacher(**{name: batch[name] for name in taken}).logits.numpy() / 2)
    fit(trainer)
    mean = sum(share * _softmax(logits) for share, logits in zip(shares, given, strict=True))
    expected = 4 * (mean * (np.log(mean) - np.log(_softmax(own)))).sum(1).mean()
    assert first_terms(trainer)["logit_loss"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("method", ["semckd", "fitnet", "pkt", "semckd+rkd", "crd"])
def test_the_feature_loss_is_the_mean_of_those_with_each_teacher_alone(tmp_path, method):
    """In the first step, projections are those that each teacher alone would begin with."""
    alone = [run(tmp_path, teacher, feature_loss=method, max_steps=1) for teacher in teachers()]
    both = run(tmp_path, teachers(), feature_loss=method, max_steps=1, teacher_weights=[3, 1])
    shares = [0.75, 0.25]
    expected = sum(w * first_terms(trainer)["feature_loss"] for w, trainer in zip(shares, alone, strict=True))
    assert first_terms(both)["feature_loss"] == pytest.approx(expected, rel=1e-9)
    if both.association() is not None:
        joined = np.concatenate([w * trainer.association() for w, trainer in zip(shares, alone, strict=True)], 1)
        assert np.allclose(both.association(), joined)
        assert both.teacher_layer_names == LAYERS


def test_a_loss_that_is_given_is_copied_for_each_teacher(tmp_path):
    given = FitNetLoss([(10, 16)], [(10, 24)])
    pair = [bert(3, 24, seed=9), bert(2, 24, seed=8)]
    trainer = run(tmp_path, pair, feature_loss=given, student_layers=[-1], teacher_layers=[-1])
    assert len({id(loss) for loss in [given, *trainer.feature_loss.losses]}) == 3
    assert trainer.teacher_layer_names == ["teachers.0.3", "teachers.1.2"]


@pytest.mark.parametrize("feature_loss", [None, "semckd"])
def test_the_cache_of_each_teacher_gives_the_live_losses(tmp_path, feature_loss):
    shared = {"feature_loss": feature_loss, "kind": _trainer_for(feature_loss), "num_train_epochs": 2, "max_steps": -1}
    live = run(tmp_path / "live", teachers(), **shared)
    cached = run(tmp_path / "one", teachers(), **shared, teacher_cache_dir=str(tmp_path / "cache"))
    assert_same(outcome(live), outcome(cached))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    # The caches hold every teacher's own outputs: another temperature, other weights and a single teacher find them.
    again = {**shared, "teacher_cache_dir": str(tmp_path / "cache")}
    for teacher, more in ((teachers(), {"temperature": 3.0, "teacher_weights": [1, 5]}), (teachers()[1], {})):
        trainer = make(tmp_path / "two", teacher, **again, **more)
        with pytest.MonkeyPatch.context() as patch:
            for member in trainer.pair.teachers:
                patch.setattr(member, "load", lambda: pytest.fail("a teacher runs"))
            fit(trainer)


def _trainer_for(feature_loss: str | None) -> Any:
    if feature_loss is not None:
        return OrderedTrainer
    return type("Ordered", (DistillationTrainer,), {"_get_train_sampler": OrderedTrainer._get_train_sampler})


def test_one_object_given_twice_has_one_cache(tmp_path):
    teacher = bert(3, 24, seed=9)
    live = run(tmp_path / "live", (teacher, teacher), num_train_epochs=2, max_steps=-1)
    cache = {"teacher_cache_dir": str(tmp_path / "cache"), "num_train_epochs": 2, "max_steps": -1}
    assert_same(outcome(live), outcome(run(tmp_path / "cached", (teacher, teacher), **cache)))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_caches_of_teachers_given_by_folder_are_filled_ahead(tmp_path):
    folders = [str(tmp_path / name) for name in ("bert", "distilbert")]
    for folder, teacher in zip(folders, teachers(), strict=True):
        teacher.double().save_pretrained(folder)
    cache = {"teacher_cache_dir": str(tmp_path / "cache")}
    assert make(tmp_path / "fill", folders, **cache).fill_teacher_cache() == 12
    unloaded = make(tmp_path / "train", folders, **cache)
    assert all(entry.is_meta for teacher in unloaded.pair.teachers for entry in teacher.model.parameters())
    fit(unloaded)
    assert all(entry.is_meta for teacher in unloaded.pair.teachers for entry in teacher.model.parameters())
    assert_same(outcome(unloaded), outcome(run(tmp_path / "live", folders)))


@pytest.mark.parametrize("data", ["sentences", "pictures"])
def test_a_batch_is_the_same_in_micro_batches(tmp_path, data):
    image = data == "pictures"
    parts: dict[str, Any] = {
        "train_dataset": pictures(16) if image else texts(16),
        "num_train_epochs": 2,
        "max_steps": -1,
    }
    outcomes = []
    for size, steps in ((8, 1), (2, 4)):
        pair = [vit(3, 24, seed=9), resnet((8, 16), seed=5)] if image else teachers()
        student = (vit() if image else bert()).double()
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "relation_weight": 0.0}
        outcomes.append(outcome(run(tmp_path, pair, model=student, **parts, **sizes)))
    assert_same(*outcomes)


@pytest.mark.parametrize("student", [vit, resnet])
def test_teachers_of_images_may_be_of_different_kinds(tmp_path, student):
    pair = [resnet((8, 16), seed=5), vit(3, 24, seed=9)]
    trainer = run(tmp_path, pair, model=student().double(), train_dataset=pictures(12))
    assert trainer.association().shape == (2, 5)
    assert np.allclose(trainer.association()[:, :2].sum(1), 0.5) and np.allclose(trainer.association().sum(1), 1)
    kinds = [type(loss.association).__name__ for loss in trainer.feature_loss.losses]
    cnn = "SinkhornAssociation" if student is resnet else "SimilarityAssociation"
    assert kinds == [cnn, "SimilarityAssociation"]
    # Between CNNs the default weight is 100, elsewhere 3: in the sum each loss keeps its own.
    shares = [0.5, 0.5 * 3 / 100] if student is resnet else [0.5, 0.5]
    assert trainer.feature_loss.shares == pytest.approx(shares)
    assert all(np.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)


@pytest.mark.parametrize("model", [bert_tokens, gpt2], ids=["tokens", "next word"])
def test_teachers_of_tokens_have_the_mean_at_each_position(tmp_path, model):
    labels = "token" if model is bert_tokens else "input"
    data = texts(4, labels=labels, types=False)
    pair = [model(layers=3, width=24, seed=9), model(layers=1, width=12, seed=4)]
    trainer = make(tmp_path, pair, model=model().double(), train_dataset=data, max_steps=1)
    batch = {name: torch.stack([row[name] for row in data.rows]) for name in ("input_ids", "attention_mask")}
    targets = torch.stack([row["labels"] for row in data.rows])
    with torch.no_grad():
        own, *given = (m.eval()(**batch).logits.numpy() / 2 for m in (trainer.student, *trainer.teacher))
    mean = sum(_softmax(logits) for logits in given) / 2
    divergence, kept = 4 * (mean * (np.log(mean) - np.log(_softmax(own)))).sum(-1), (targets != -100).numpy()
    if model is gpt2:
        divergence, kept = divergence[:, :-1], kept[:, 1:]
    fit(trainer)
    assert first_terms(trainer)["logit_loss"] == pytest.approx(divergence[kept].mean(), rel=1e-9)


def test_classes_in_another_order_are_put_into_the_students(tmp_path):
    names = ["ant", "bee", "cat"]
    student, plain, turned = bert(), bert(3, 24, seed=9), bert(3, 24, seed=9)
    for model, order in ((student, names), (plain, names), (turned, names[::-1])):
        model.config.id2label, model.config.label2id = dict(enumerate(order)), {n: i for i, n in enumerate(order)}
    with torch.no_grad():
        for entry in (turned.classifier.weight, turned.classifier.bias):
            entry.copy_(entry.flip(0))
    alone = run(tmp_path, plain, model=student.double(), max_steps=1)
    student = bert()
    student.config.id2label, student.config.label2id = alone.student.config.id2label, alone.student.config.label2id
    both = run(tmp_path, [turned, plain], model=student.double(), max_steps=1)
    assert first_terms(both)["logit_loss"] == pytest.approx(first_terms(alone)["logit_loss"], rel=1e-9)


def test_a_training_goes_on_where_it_stopped(tmp_path):
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = run(tmp_path / "whole", teachers(), **args)
    resumed = make(tmp_path / "again", teachers(), **args)
    fit(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(outcome(whole), outcome(resumed), 0.0)


def test_what_is_saved_is_the_student_and_the_names_of_all_teachers(tmp_path):
    trainer = run(tmp_path / "out", teachers(), teacher_weights=[1, 3])
    trainer.save_model()
    trainer.create_model_card()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.state_dict().keys() == bert().state_dict().keys()
    saved = json.loads((tmp_path / "out" / "distillation_config.json").read_text())
    assert saved["teacher"] == ["BertForSequenceClassification", "DistilBertForSequenceClassification"]
    assert saved["distillation"]["teacher_weights"] == [0.25, 0.75]
    card = (tmp_path / "out" / "README.md").read_text()
    parameters = sum(entry.numel() for teacher in teachers() for entry in teacher.parameters())
    assert "from `BertForSequenceClassification` and `DistilBertForSequenceClassification`" in card
    assert f"{parameters:,} parameters" in card and "`0.25, 0.75`" in card


@pytest.mark.parametrize("fails", [False, True])
def test_no_teacher_is_changed(tmp_path, fails):
    pair = [teacher.double() for teacher in teachers()]
    before = [{name: value.clone() for name, value in teacher.state_dict().items()} for teacher in pair]
    attributes = [{*vars(module)} for teacher in pair for module in teacher.modules()]
    trainer = make(tmp_path, pair)
    if fails:
        handle = pair[1].classifier.register_forward_hook(lambda *_: torch.full((4, LABELS), torch.nan).double())
        with pytest.raises(TeacherOutputError, match=r"teachers\.1\.logits"):
            fit(trainer)
        handle.remove()
    else:
        fit(trainer)
    assert all(one is other for one, other in zip(trainer.teacher, pair, strict=True))
    for teacher, state in zip(pair, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
        assert not teacher.training and not any(entry.requires_grad for entry in teacher.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())
    assert attributes == [{*vars(module)} for teacher in pair for module in teacher.modules()]


def test_layers_may_be_named_for_each_teacher(tmp_path):
    layers = ["teachers.0.2", "teachers.1.1", "teachers.1.-1"]
    trainer = run(tmp_path, teachers(), teacher_layers=layers)
    assert trainer.teacher_layer_names == ["teachers.0.2", "teachers.1.1", "teachers.1.4"]
    names = ["teachers.0.bert.encoder.layer.1", "teachers.1.distilbert.transformer.layer.2"]
    assert run(tmp_path, teachers(), teacher_layers=names).teacher_layer_names == names
    with pytest.raises(ConfigurationError, match="`teacher_layers` is not a list of layers"):
        make(tmp_path, teachers(), teacher_layers=["teachers.0.2"])
    with pytest.raises(LayerNotFoundError, match="has no module"):
        make(tmp_path, teachers(), teacher_layers=[*names, "teachers.2.encoder"])


def test_the_report_shows_the_layers_of_all_teachers():
    batch = {name: torch.stack([row[name] for row in texts(2).rows]) for name in ("input_ids", "attention_mask")}
    pair = teachers()
    report = inspect_models(bert(), pair, batch)
    assert report.teacher.layers == ["teachers.0.1", "teachers.0.2", "teachers.0.3"] + [
        f"teachers.1.{n}" for n in (1, 2, 3, 4)
    ]
    assert [len(row) for row in report.alignments] == [7, 7]
    assert "BertForSequenceClassification and DistilBertForSequenceClassification" in str(report)
    assert report.match is not None and all(model.training for model in pair) == bert().training
    assert inspect_models(bert(), [bert(3, 24), bert(labels=5)], batch).problem
    with pytest.raises(InputError, match="no teacher"):
        inspect_models(bert(), [], batch)
    single = inspect_models(bert(), [bert(3, 24)], batch)
    assert single.teacher.layers == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("given", "args", "error", "match"),
    [
        (list, {}, InputError, "no teacher"),
        (teachers, {"teacher_weights": [1.0, 1.0, 1.0]}, ConfigurationError, "do not fit the teachers"),
        (lambda: bert(3, 24), {"teacher_weights": [1.0, 1.0]}, ConfigurationError, "do not fit the teachers"),
        (lambda: [*teachers(), bert(labels=5)], {}, InputError, "different shapes"),
        (lambda: [*teachers(), 3], {}, InputError, "The teacher is not a model"),
    ],
    ids=["none", "too many weights", "weights of one", "classes", "no model"],
)
def test_teachers_that_cannot_teach_together_are_refused(tmp_path, given, args, error, match):
    with pytest.raises(error, match=match) as caught:
        make(tmp_path, given(), kind=SemCKDTrainer, **args)
    assert all(part in str(caught.value) for part in ("received: ", "expected: ", "what to do: "))


def test_a_method_that_takes_the_teachers_classifier_needs_one_teacher(tmp_path):
    pair = [resnet((8, 16), seed=9), resnet((8, 16), seed=5)]
    with pytest.raises(ConfigurationError, match="with one teacher"):
        make(tmp_path, pair, model=resnet().double(), train_dataset=pictures(8), feature_loss="simkd")


def test_a_student_among_its_teachers_is_refused(tmp_path):
    student = bert().double()
    with pytest.raises(InputError, match="same object"):
        make(tmp_path, [bert(3, 24, seed=9), student], model=student)


def test_several_teachers_that_read_the_teachers_columns_need_one_tokenizer(tmp_path):
    folders = [str(tmp_path / name) for name in ("one", "other")]
    for folder, tokenizer in zip(folders, (TEACHER, STUDENT), strict=True):
        bert(2, 24, labels=LABELS).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="different tokenizers"):
        SemCKDTrainer(bert(), config(tmp_path), collator(), dataset(), teacher_model=folders, processing_class=STUDENT)
    trainer = SemCKDTrainer(bert(), config(tmp_path), collator(), dataset(), teacher_model=[folders[0]] * 2)
    fit(trainer)


def test_images_are_normalized_for_each_teacher(tmp_path):
    processors = [ViTImageProcessor(image_mean=[m] * 3, image_std=[0.5] * 3) for m in (0.5, 0.4)]
    folders = [str(tmp_path / name) for name in ("one", "other")]
    for folder, processor in zip(folders, processors, strict=True):
        vit(3, 24, seed=9).save_pretrained(folder)
        processor.save_pretrained(folder)
    trainer = SemCKDTrainer(
        vit(), config(tmp_path), None, images(12), teacher_model=folders, processing_class=processors[0]
    )
    assert trainer.pair.teachers[0].images.scale == ()
    assert trainer.pair.teachers[1].images.shift == pytest.approx((0.2,) * 3)
    fit(trainer)
    own = Samples([{**row, "teacher_pixel_values": row["pixel_values"]} for row in images(12).rows])
    with pytest.raises(InputError, match="image normalizations"):
        SemCKDTrainer(vit(), config(tmp_path), None, own, teacher_model=folders)
