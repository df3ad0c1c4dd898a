"""The trainer as a drop-in for `Trainer`: what the teacher must not notice, what must be equal, what may be given."""

import copy
import io
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset as HubDataset
from makers import (
    IMAGE,
    LABELS,
    VOCABULARY,
    Samples,
    assert_same_weights,
    bert,
    bert_mlm,
    bert_tokens,
    config,
    distilbert,
    distiller,
    gpt2,
    images,
    losses,
    plain_arguments,
    resnet,
    texts,
    traces,
    vit,
    weights,
)
from torch import nn
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import HPSearchBackend

from hf_semckd import DistillationTrainer, SemCKDConfig, SemCKDTrainer
from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.training.attachment import FEATURE_LOSS_NAME

NOTHING = {"logit_weight": 0.0, "feature_weight": 0.0}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing takes longer than training."""
    monkeypatch.setattr("hf_semckd.training.callbacks.save_association_plot", lambda *_, **__: None)


class Calls:
    """Counts how often a model runs, through a hook of the test's own."""

    def __init__(self, model):
        self.count = 0
        model.register_forward_pre_hook(self._add)

    def _add(self, *_):
        self.count += 1


class At(TrainerCallback):
    """Does something with the trained model at an event."""

    def __init__(self, event, action):
        self.action = action
        setattr(self, event, self._act)

    def _act(self, args, state, control, model=None, **_):
        self.action(model)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


# ---- The teacher is never trained, saved, counted or asked in evaluation -----------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_is_unchanged_to_the_last_bit(tmp_path, dtype):
    teacher = vit(3, 24, seed=9, hidden_dropout_prob=0.3).to(dtype)
    before = weights(teacher)
    trainer = distiller(tmp_path, teacher_model=teacher, args={"max_steps": 4})
    trainer.train()
    assert trainer.teacher is teacher
    assert_same_weights(weights(teacher), before)
    assert {parameter.dtype for parameter in teacher.parameters()} == {dtype}
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert {parameter.dtype for parameter in trainer.student.parameters()} == {torch.float32}


def test_the_teachers_batch_statistics_stand_still(tmp_path):
    teacher = resnet((8, 12, 16), seed=9)
    before = weights(teacher)
    distiller(tmp_path, teacher_model=teacher).train()
    assert any(name.endswith("running_mean") for name in before)
    assert_same_weights(weights(teacher), before)


def test_a_teacher_in_training_mode_is_put_back(tmp_path):
    """Dropout of the teacher would show: with it the losses are others."""

    def run(callback):
        teacher = vit(3, 24, seed=9, hidden_dropout_prob=0.5)
        trainer = distiller(tmp_path, teacher_model=teacher)
        if callback:
            teacher.train()
            trainer.add_callback(At("on_step_begin", lambda _: teacher.train()))
        trainer.train()
        assert not any(module.training for module in teacher.modules())
        return losses(trainer)

    assert run(False) == run(True)


def test_student_counts_are_the_students_alone(tmp_path):
    student = vit()
    names = [name for name, _ in student.named_parameters()]
    trainer = distiller(tmp_path, model=student)
    own = {id(parameter) for parameter in trainer.teacher.parameters()}
    during = []
    trainer.add_callback(At("on_step_end", lambda model: during.append([id(p) for p in model.parameters()])))
    trainer.train()
    assert len(during) == 3 and not own & set(during[0])
    assert [name for name, _ in trainer.student.named_parameters()] == names
    assert trainer.student.num_parameters() == vit().num_parameters()


@pytest.mark.parametrize(("model", "teacher", "rows"), [(vit, vit, images), (bert, bert, texts)])
def test_operations_are_counted_as_in_plain_training(tmp_path, model, teacher, rows):
    plain = Trainer(model(), plain_arguments(tmp_path), train_dataset=rows())
    plain.train()
    trainer = distiller(tmp_path, model=model(), teacher_model=teacher(3, 24, seed=9), train_dataset=rows())
    trainer.train()
    assert trainer.state.total_flos == plain.state.total_flos > 0


def test_evaluation_and_prediction_leave_the_teacher_alone(tmp_path):
    trainer = distiller(tmp_path, eval_dataset=images(8, seed=2))
    calls = Calls(trainer.teacher)
    trainer.evaluate()
    trainer.predict(images(5, seed=3))
    assert calls.count == 0
    trainer.train()
    trained = calls.count
    assert trained >= 3
    trainer.evaluate()
    trainer.predict(images(5, seed=3))
    assert calls.count == trained


def test_evaluation_within_training_leaves_the_teacher_alone(tmp_path):
    counts = []
    for changes in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = distiller(tmp_path, eval_dataset=images(8, seed=2), args=changes)
        calls = Calls(trainer.teacher)
        trainer.train()
        counts.append(calls.count)
    assert len(losses(trainer, "eval_loss")) == 3
    assert counts[0] == counts[1]


def test_evaluation_within_training_changes_nothing(tmp_path):
    results = []
    for changes in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = distiller(tmp_path, eval_dataset=images(8, seed=2), args=changes)
        trainer.train()
        results.append((weights(trainer.student), losses(trainer)))
    assert_same_weights(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


# ---- With all distillation weights 0 it is Trainer ---------------------------------------------------------------


def student_with_dropout():
    return vit(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1)


PLAIN_RUNS = {
    "dropout": (student_with_dropout, images, {}),
    "padding": (bert, texts, {}),
    "accumulation": (bert, texts, {"gradient_accumulation_steps": 2, "max_steps": 4}),
    "ragged": (student_with_dropout, lambda: images(11), {"num_train_epochs": 2, "max_steps": -1}),
    "smoothing": (vit, images, {"label_smoothing_factor": 0.1}),
    "tokens": (bert_tokens, lambda: texts(labels="token"), {"gradient_accumulation_steps": 2}),
    "causal": (gpt2, lambda: texts(labels="input", types=False), {"gradient_accumulation_steps": 2}),
    "schedule": (resnet, images, {"warmup_steps": 1, "weight_decay": 0.1, "lr_scheduler_type": "cosine"}),
}


def assert_same_run(trainer, plain):
    keys = ("loss", "grad_norm", "learning_rate", "eval_loss", "train_loss", "total_flos")
    history = [
        [{key: row[key] for key in keys if key in row} for row in one.state.log_history] for one in (trainer, plain)
    ]
    assert history[0] == history[1] and len(history[0]) > 2
    assert_same_weights(weights(trainer.model), weights(plain.model))


@pytest.mark.parametrize("name", PLAIN_RUNS)
@pytest.mark.parametrize("with_teacher", [False, True])
def test_without_distillation_it_is_trainer_bit_for_bit(tmp_path, name, with_teacher):
    model, rows, changes = PLAIN_RUNS[name]
    plain = Trainer(model(), plain_arguments(tmp_path / "a", **changes), train_dataset=rows())
    plain.train()
    teacher = {"teacher_model": model(seed=9) if model is bert else vit(3, 24, seed=9)} if with_teacher else {}
    args = config(tmp_path / "b", **changes, **NOTHING)
    trainer = SemCKDTrainer(model(), args, train_dataset=rows(), **teacher)
    trainer.train()
    assert_same_run(trainer, plain)
    assert len(losses(trainer)) >= 3


def test_all_weights_zero_and_converted_arguments_are_trainer_too(tmp_path):
    arguments = plain_arguments(
        tmp_path, eval_strategy="steps", eval_steps=2, max_steps=4, gradient_accumulation_steps=2
    )
    data = {"train_dataset": images(), "eval_dataset": images(6, seed=4)}
    plain = Trainer(student_with_dropout(), arguments, **data)
    plain.train()
    for task_weight in (1.0, 0.0):
        converted = SemCKDConfig.from_training_arguments(arguments)
        converted.task_weight, converted.logit_weight, converted.feature_weight = task_weight, 0.0, 0.0
        trainer = SemCKDTrainer(student_with_dropout(), converted, teacher_model=vit(3, seed=9), **data)
        trainer.train()
        assert_same_run(trainer, plain)


def test_no_feature_loss_and_no_logits_is_trainer(tmp_path):
    plain = Trainer(student_with_dropout(), plain_arguments(tmp_path), train_dataset=images())
    plain.train()
    trainer = DistillationTrainer(
        student_with_dropout(), config(tmp_path, logit_weight=0.0), train_dataset=images(), teacher_model=vit(3)
    )
    trainer.train()
    assert_same_run(trainer, plain)


def test_distillation_draws_no_random_number_of_the_students(tmp_path):
    """Plain KD with a weight that adds nothing: order of the data and dropout are those of plain training."""
    plain = Trainer(student_with_dropout(), plain_arguments(tmp_path), train_dataset=images())
    plain.train()
    teacher = vit(3, 24, seed=9, hidden_dropout_prob=0.5)
    for changes in ({"logit_weight": 1e-300}, {"feature_weight": 1e-300}):
        trainer = distiller(tmp_path, model=student_with_dropout(), teacher_model=teacher, args={**NOTHING, **changes})
        trainer.train()
        np.testing.assert_allclose(losses(trainer), losses(plain), rtol=1e-6)
        for name, value in weights(plain.model).items():
            torch.testing.assert_close(trainer.student.state_dict()[name], value, rtol=1e-5, atol=1e-6)


class Augmented(Samples):
    """Draws random numbers for every sample."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        return {**row, "pixel_values": row["pixel_values"] + torch.randn(3, IMAGE, IMAGE)}


def test_looking_at_the_data_draws_no_random_number_of_an_augmentation(tmp_path):
    plain = Trainer(vit(), plain_arguments(tmp_path), train_dataset=Augmented(images().rows))
    plain.train()
    trainer = distiller(tmp_path, train_dataset=Augmented(images().rows), args={**NOTHING, "feature_weight": 1e-300})
    trainer.train()
    np.testing.assert_allclose(losses(trainer), losses(plain), rtol=1e-6)


def test_plain_arguments_get_the_defaults_and_stay_as_they_are(tmp_path):
    arguments = plain_arguments(tmp_path)
    before = dict(vars(arguments))
    trainer = distiller(tmp_path, model=vit())
    converted = SemCKDTrainer(vit(), arguments, teacher_model=vit(3, 24, seed=9), train_dataset=images())
    trainer.train()
    converted.train()
    assert losses(trainer) == losses(converted)
    assert type(arguments).__name__ == "TrainingArguments" and vars(arguments) == before


# ---- Nothing stays on the models ---------------------------------------------------------------------------------


class BrokenError(RuntimeError):
    """Raised by a test in the middle of training."""


def fail_in_callback(trainer):
    def action(_):
        raise BrokenError

    trainer.add_callback(At("on_step_end", action))


def fail_in_teacher(trainer):
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) > 2:
            raise BrokenError

    trainer.teacher.classifier.register_forward_hook(hook)


def fail_in_student(trainer):
    calls = []

    def hook(module, *_):
        calls.append(1)
        if len(calls) > 1:
            raise BrokenError

    trainer.student.vit.layernorm.register_forward_hook(hook)


def fail_by_nan(trainer):
    trainer.train_dataset.rows[5]["pixel_values"][:] = torch.nan


def fail_by_interrupt(trainer):
    def action(_):
        raise KeyboardInterrupt

    trainer.add_callback(At("on_substep_end", action))
    trainer.add_callback(At("on_step_end", action))


FAILURES = {
    "success": (lambda trainer: None, ()),
    "callback": (fail_in_callback, BrokenError),
    "teacher": (fail_in_teacher, BrokenError),
    "student": (fail_in_student, BrokenError),
    "nan": (fail_by_nan, (InputError, ValueError)),
    "interrupt": (fail_by_interrupt, KeyboardInterrupt),
}


def run_until_it_stops(trainer, errors):
    if not errors:
        trainer.train()
        return
    with pytest.raises(errors):
        trainer.train()


def without_test_hooks(model):
    """The test's own hooks are no concern of the library."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if hook.__module__ == __name__:
                del module._forward_hooks[key]
    return model


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("end", FAILURES)
def test_student_and_teacher_are_as_before_whatever_happens(tmp_path, end, bf16):
    prepare, errors = FAILURES[end]
    student, teacher = vit(), vit(3, 24, seed=9)
    before = [traces(model) for model in (student, teacher)]
    trainer = distiller(tmp_path, model=student, teacher_model=teacher, args={"bf16": bf16})
    prepare(trainer)
    run_until_it_stops(trainer, errors)
    assert [traces(without_test_hooks(model)) for model in (student, teacher)] == before
    pickle.dumps(student)
    pickle.dumps(teacher)
    twin = vit()
    assert set(student.state_dict()) == set(twin.state_dict())
    assert set(dict(student.named_buffers())) == set(dict(twin.named_buffers()))


@pytest.mark.parametrize("model", [bert, resnet, distilbert])
def test_no_trace_on_other_families(tmp_path, model):
    images_or_texts = images() if model is resnet else texts(types=False)
    teacher = resnet((8, 12, 16), seed=9) if model is resnet else bert(3, 24, seed=9)
    student = model()
    before = [traces(student), traces(teacher)]
    distiller(tmp_path, model=student, teacher_model=teacher, train_dataset=images_or_texts).train()
    assert [traces(student), traces(teacher)] == before


def test_named_layers_leave_no_hook(tmp_path):
    student, teacher = resnet(), resnet((8, 12, 16), seed=9)
    layers = {
        "student_layers": ["resnet.encoder.stages.0", "resnet.encoder.stages.1"],
        "teacher_layers": ["resnet.encoder.stages.2"],
    }
    for prepare, errors in (FAILURES["success"], FAILURES["callback"]):
        before = [traces(student), traces(teacher)]
        trainer = distiller(tmp_path, model=student, teacher_model=teacher, args=layers)
        prepare(trainer)
        run_until_it_stops(trainer, errors)
        assert [traces(student), traces(teacher)] == before


def test_a_student_can_be_trained_on_after_a_failure(tmp_path):
    trainer = distiller(tmp_path)
    start = weights(trainer.student)
    failing = At("on_step_begin", lambda _: 1 / 0)
    trainer.add_callback(failing)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert_same_weights(weights(trainer.student), start)
    trainer.remove_callback(failing)
    trainer.train()
    fresh = distiller(tmp_path)
    fresh.train()
    # The failed step's samples were seen by the teacher's statistics already.
    np.testing.assert_allclose(losses(trainer)[-3:], losses(fresh), rtol=1e-2)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_copy_made_in_training_is_a_whole_model(tmp_path, bf16):
    """An exponential moving average copies the model in a callback, and evaluates with the copy."""
    copies = []
    trainer = distiller(tmp_path, args={"max_steps": 4, "bf16": bf16})
    trainer.add_callback(At("on_step_end", lambda model: copies.append((copy.deepcopy(model), weights(model)))))
    trainer.train()
    twin, state = copies[1]
    assert_same_weights(weights(twin), state)
    assert not torch.equal(twin.classifier.weight, trainer.student.classifier.weight)
    plain = vit()
    plain.load_state_dict(state)
    pixels = torch.stack([row["pixel_values"] for row in images(4)])
    with torch.no_grad():
        expected, logits = plain.eval()(pixel_values=pixels).logits, twin.eval()(pixel_values=pixels).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-2 if bf16 else 1e-6)


def test_callbacks_get_the_plain_student_and_share_its_weights(tmp_path):
    """What a callback averages, saves or changes is the student's; the projections are none of its business."""
    seen = []

    def look(model):
        model.save_pretrained(tmp_path / "by_callback")
        seen.append((type(model), sorted(model.state_dict()), [id(entry) for entry in model.parameters()]))
        with torch.no_grad():
            model.classifier.bias.fill_(7.0)

    trainer = distiller(tmp_path, args={"max_steps": 2, "save_steps": 2, "save_strategy": "steps"})
    plain = type(trainer.student), sorted(weights(trainer.student)), [id(p) for p in trainer.student.parameters()]
    for moment in ("on_train_begin", "on_step_end", "on_log", "on_save", "on_train_end"):
        trainer.add_callback(At(moment, look))
    trainer.train()
    assert len(seen) >= 6 and all(entry == plain for entry in seen)
    assert trainer.student.classifier.bias.tolist() == [7.0] * 3
    _, info = type(vit()).from_pretrained(tmp_path / "by_callback", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert trainer.callback_handler.model is trainer.student is trainer.model


def test_the_trained_student_survives_torch_save(tmp_path):
    trainer = distiller(tmp_path)
    trainer.train()
    file = io.BytesIO()
    torch.save(trainer.student, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(vit())
    assert_same_weights(weights(loaded), weights(trainer.student))


def test_the_calibration_learns_and_stays_with_the_trainer(tmp_path):
    trainer = distiller(tmp_path)
    assert trainer.feature_loss is not None
    before = weights(trainer.feature_loss)
    trainer.train()
    projections = [name for name in before if name.startswith("projection") and name.endswith("weight")]
    assert projections
    for name in projections:
        assert not torch.equal(trainer.feature_loss.state_dict()[name], before[name])
    assert not any(FEATURE_LOSS_NAME in name for name, _ in trainer.student.named_modules())


def test_training_twice_goes_on_from_the_first(tmp_path):
    trainer = distiller(tmp_path, args={"relation_weight": 0.0})
    trainer.train()
    first = losses(trainer, "task_loss")
    trainer.train()
    assert losses(trainer, "task_loss")[-1] < first[0]


# ---- What may be given -------------------------------------------------------------------------------------------


class Convolutional(nn.Module):
    """Takes `x` and returns a tensor of logits."""

    def __init__(self, width=6, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.body = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, LABELS)

    def forward(self, x):
        return self.head(self.body(self.stem(x).relu()).relu().mean((2, 3)))


class NamedInput(Convolutional):
    """Takes `pixel_values`, as the columns are called."""

    def forward(self, pixel_values):
        return super().forward(pixel_values)


class InDictionary(Convolutional):
    """Returns logits in a dictionary."""

    def forward(self, pixel_values):
        return {"logits": super().forward(pixel_values), "extra": pixel_values}


class Logits:
    """An output with an attribute and nothing else."""

    def __init__(self, logits):
        self.logits = logits


class InObject(Convolutional):
    """Returns logits in an object."""

    def forward(self, pixel_values):
        return Logits(super().forward(pixel_values))


LAYERS = ["stem", "body"]


def learns(trainer, model=None):
    """Train, and check that the student moved and every term was computed."""
    student = trainer.student if model is None else model
    before = weights(student)
    trainer.train()
    moved = [name for name, value in weights(student).items() if not torch.equal(value, before[name])]
    assert len(moved) > 1
    for name in ("loss", "task_loss", "logit_loss", "feature_loss"):
        values = losses(trainer, name)
        assert len(values) >= 3 and all(value > 0 for value in values), name
    return trainer


@pytest.mark.parametrize("kind", [Convolutional, NamedInput, InDictionary])
def test_plain_modules_as_student(tmp_path, kind):
    trainer = distiller(
        tmp_path,
        model=kind(),
        args={"student_layers": LAYERS},
        eval_dataset=images(6, seed=3),
        compute_metrics=accuracy,
    )
    learns(trainer)
    assert {"eval_loss", "eval_accuracy"} <= set(trainer.evaluate())
    assert trainer.predict(images(6, seed=3)).predictions.shape == (6, LABELS)


@pytest.mark.parametrize("kind", [Convolutional, NamedInput, InDictionary, InObject])
def test_plain_modules_as_teacher(tmp_path, kind):
    learns(distiller(tmp_path, teacher_model=kind(8, seed=9), args={"teacher_layers": LAYERS}))


def test_plain_modules_for_both_and_a_dataset_with_columns(tmp_path):
    rows = images()
    data = HubDataset.from_dict(
        {"image": [row["pixel_values"].tolist() for row in rows], "labels": [row["labels"] for row in rows]}
    ).with_format("torch")
    args = {"student_layers": LAYERS, "teacher_layers": LAYERS}
    trainer = distiller(
        tmp_path, model=Convolutional(), teacher_model=Convolutional(8, 9), train_dataset=data, args=args
    )
    learns(trainer)


class WithoutLabels(PreTrainedModel):
    """A model of transformers' kind whose forward takes no labels; its teacher's does."""

    config_class = PreTrainedConfig

    def __init__(self, settings):
        super().__init__(settings)
        self.body, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, LABELS)
        self.post_init()

    def forward(self, pixel_values):
        return {"logits": self.head(self.body(pixel_values).relu().mean((2, 3)))}


def test_labels_that_the_teacher_alone_names_are_the_students_too(tmp_path):
    trainer = distiller(tmp_path, model=WithoutLabels(PreTrainedConfig()), args={"student_layers": ["body"]})
    learns(trainer)
    assert trainer.evaluate(images(6))["eval_loss"] > 0


def test_a_loss_outside_training_is_the_students_own(tmp_path):
    trainer, rows = distiller(tmp_path), images(4)
    calls = Calls(trainer.teacher)
    batch = trainer.data_collator([rows[index] for index in range(4)])
    loss = trainer.compute_loss(trainer.model.train(), batch)
    assert float(loss.detach()) == float(vit().train()(**batch).loss.detach()) and calls.count == 0


def column_dataset(name="labels"):
    rows = [{"pixel_values": row["pixel_values"].tolist(), name: row["labels"], "file": "a.png"} for row in images()]
    return HubDataset.from_list(rows).with_format("torch")


def test_a_label_column_and_columns_nobody_takes(tmp_path):
    runs = []
    for data in (images(), column_dataset("label")):
        trainer = learns(distiller(tmp_path, train_dataset=data, eval_dataset={"a": data, "b": data}))
        assert {"eval_a_loss", "eval_b_loss"} <= set(trainer.evaluate())
        runs.append(losses(trainer))
    assert runs[0] == runs[1]


class Stream(IterableDataset):
    """The pictures, one after the other."""

    def __iter__(self):
        return iter(images())


@pytest.mark.parametrize("data", [Stream(), column_dataset().to_iterable_dataset()])
def test_streams_are_trained_on_in_their_order(tmp_path, data):
    plain = Trainer(vit(), plain_arguments(tmp_path), train_dataset=data)
    plain.train()
    trainer = learns(distiller(tmp_path, train_dataset=data))
    assert losses(trainer, "task_loss")[0] == pytest.approx(losses(plain)[0], rel=1e-5)


def test_a_collator_makes_batches_of_whatever_the_dataset_gives(tmp_path):
    rows = [(row["pixel_values"], row["labels"]) for row in images()]

    def collate(pairs):
        return {"pixel_values": torch.stack([x for x, _ in pairs]), "labels": torch.tensor([y for _, y in pairs])}

    trainer = learns(distiller(tmp_path, train_dataset=rows, data_collator=collate))
    expected = distiller(tmp_path)
    expected.train()
    assert losses(trainer) == losses(expected)


def test_the_task_loss_of_a_plain_module_is_cross_entropy(tmp_path):
    student, rows = Convolutional(), images(4)
    batch = torch.stack([row["pixel_values"] for row in rows])
    chances = torch.softmax(student(batch).detach().double(), -1)
    expected = -sum(chances[i, row["labels"]].log() for i, row in enumerate(rows)) / 4
    trainer = distiller(tmp_path, model=student, train_dataset=rows, args={"student_layers": LAYERS, "max_steps": 1})
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
    trainer.train()
    assert losses(trainer, "task_loss")[0] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("as_path", [False, True])
def test_folders_for_both(tmp_path, as_path):
    folders = [tmp_path / name for name in ("student", "teacher")]
    vit().save_pretrained(folders[0])
    vit(3, 24, seed=9).save_pretrained(folders[1])
    student, teacher = folders if as_path else map(str, folders)
    by_folder = learns(distiller(tmp_path, model=student, teacher_model=teacher))
    by_object = learns(distiller(tmp_path))
    assert losses(by_folder) == losses(by_object)
    assert_same_weights(weights(by_folder.student), weights(by_object.student))


@pytest.mark.parametrize(("student", "teacher"), [(vit, resnet), (resnet, vit)])
def test_convolutions_and_transformers_teach_each_other(tmp_path, student, teacher):
    pupil = student()
    master = resnet((8, 12, 16), seed=9) if teacher is resnet else vit(3, 24, seed=9)
    trainer = learns(distiller(tmp_path, model=pupil, teacher_model=master))
    assert trainer.association().shape == (2, 3)


def test_token_types_go_to_the_teacher_that_takes_them(tmp_path):
    """BERT teaches DistilBERT, whose forward has no token_type_ids."""
    seen = []
    teacher = bert(3, 24, seed=9)
    trainer = distiller(
        tmp_path, model=distilbert(), teacher_model=teacher, train_dataset=texts(), eval_dataset=texts(6)
    )
    teacher.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["token_type_ids"]), with_kwargs=True)
    learns(trainer)
    assert len(seen) >= 3 and any(bool(types.any()) for types in seen)
    assert trainer.evaluate()["eval_loss"] > 0


def test_token_types_of_a_dataset_with_columns_reach_the_teacher(tmp_path):
    """`remove_unused_columns` must not drop what only the teacher takes."""
    rows = texts()
    data = HubDataset.from_list([{name: value.tolist() for name, value in row.items()} for row in rows])
    results = []
    for dataset in (rows, data.add_column("text", ["words"] * len(rows)).with_format("torch")):
        trainer = distiller(tmp_path, model=distilbert(), teacher_model=bert(3, 24, seed=9), train_dataset=dataset)
        learns(trainer)
        results.append(losses(trainer))
    assert results[0] == results[1]


def two_tokenizations(count=12):
    rows, longer = texts(count, types=False), texts(count, seed=5, length=14, types=False)
    extra = ("input_ids", "attention_mask")
    return Samples(
        [
            {**row, **{f"teacher_{name}": other[name] for name in extra}}
            for row, other in zip(rows, longer, strict=True)
        ]
    )


def test_a_teacher_with_its_own_tokens(tmp_path):
    seen = []
    teacher = bert(3, 24, seed=9)
    trainer = distiller(tmp_path, model=distilbert(), teacher_model=teacher, train_dataset=two_tokenizations())
    teacher.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    learns(trainer)
    assert set(seen) == {14}
    assert trainer.evaluate(two_tokenizations(6))["eval_loss"] > 0
    assert trainer.predict(two_tokenizations(6)).predictions.shape == (6, LABELS)


def test_a_teacher_with_its_own_image_size(tmp_path):
    rows, larger = images(), images(seed=6, size=2 * IMAGE)
    data = Samples(
        [{**row, "teacher_pixel_values": other["pixel_values"]} for row, other in zip(rows, larger, strict=True)]
    )
    teacher = vit(3, 24, seed=9, image_size=2 * IMAGE)
    learns(distiller(tmp_path, teacher_model=teacher, train_dataset=data))


def test_what_the_teacher_gets_decides_the_logit_loss(tmp_path):
    """The teacher's own columns are used, and the student's are not: computed by hand for the first step."""
    data = two_tokenizations(4)
    student, teacher = distilbert(), bert(3, 24, seed=9, initializer_range=0.5).eval()
    stacked = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    with torch.no_grad():
        target = teacher(input_ids=stacked["teacher_input_ids"], attention_mask=stacked["teacher_attention_mask"])
        logits = student(input_ids=stacked["input_ids"], attention_mask=stacked["attention_mask"]).logits
    p, q = (torch.softmax(x.double() / 4, -1) for x in (target.logits, logits))
    expected = 16 * float((p * (p / q).log()).sum(-1).mean())
    assert expected > 0.01
    trainer = distiller(tmp_path, model=student, teacher_model=teacher, train_dataset=data, args={"max_steps": 1})
    trainer.train()
    assert losses(trainer, "logit_loss")[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("model", "labels"), [(bert_mlm, "input"), (bert_tokens, "token"), (gpt2, "input")])
def test_heads_of_tokens(tmp_path, model, labels):
    rows = texts(labels=labels, types=False)
    trainer = distiller(
        tmp_path, model=model(), teacher_model=model(layers=3, width=24, seed=9), train_dataset=rows, eval_dataset=rows
    )
    learns(trainer)
    assert trainer.evaluate()["eval_loss"] > 0
    classes = LABELS if model is bert_tokens else VOCABULARY
    assert trainer.predict(rows).predictions.shape == (12, 10, classes)


def test_layers_by_name_are_those_of_the_hidden_states(tmp_path):
    """ResNet's stages are its hidden states; by name or by index, training is the same."""
    runs = []
    named = [f"resnet.encoder.stages.{index}" for index in (0, 1)]
    for student_layers, teacher_layers in ([named, named], [[1, 2], [1, 2]]):
        args = {"student_layers": student_layers, "teacher_layers": teacher_layers}
        trainer = distiller(tmp_path, model=resnet(), teacher_model=resnet((8, 12, 16), seed=9), args=args)
        learns(trainer)
        runs.append((losses(trainer), losses(trainer, "feature_loss")))
        assert trainer.student_layer_names == list(map(str, student_layers))
    assert runs[0] == runs[1]


def test_hooks_on_modules_of_a_transformer(tmp_path):
    args = {"student_layers": ["vit.layernorm"], "teacher_layers": ["vit.layernorm", "vit.embeddings"]}
    trainer = learns(distiller(tmp_path, args=args))
    assert trainer.association().shape == (1, 2)


def test_label_names_of_the_user(tmp_path):
    trainer = distiller(tmp_path, args={"label_names": ["labels"]}, eval_dataset=images(6), compute_metrics=accuracy)
    learns(trainer)
    assert trainer.label_names == ["labels"]
    assert "eval_accuracy" in trainer.evaluate()


@pytest.mark.parametrize("named", [False, True])
def test_evaluation_is_that_of_a_plain_trainer_with_the_trained_student(tmp_path, named):
    """Also for a BERT with a teacher that takes other columns."""
    if named:
        parts = {"model": distilbert(), "teacher_model": bert(3, 24, seed=9), "train_dataset": texts()}
        unseen = texts(7, seed=3, types=False)
    else:
        parts, unseen = {}, images(7, seed=3)
    trainer = distiller(tmp_path, compute_metrics=accuracy, eval_dataset=unseen, **parts)
    trainer.train()
    plain = Trainer(
        copy.deepcopy(trainer.student), plain_arguments(tmp_path), eval_dataset=unseen, compute_metrics=accuracy
    )
    for one, other in ((trainer.evaluate(), plain.evaluate()),):
        assert {"eval_loss", "eval_accuracy"} <= set(one)
        assert {key: one[key] for key in ("eval_loss", "eval_accuracy")} == {
            key: other[key] for key in ("eval_loss", "eval_accuracy")
        }
    mine, theirs = trainer.predict(unseen), plain.predict(unseen)
    np.testing.assert_array_equal(mine.predictions, theirs.predictions)
    np.testing.assert_array_equal(mine.label_ids, theirs.label_ids)
    assert mine.metrics["test_loss"] == theirs.metrics["test_loss"]


def test_evaluation_before_training_and_without_training_data(tmp_path):
    trainer = distiller(tmp_path, train_dataset=None, eval_dataset=images(6), compute_metrics=accuracy)
    plain = Trainer(vit(), plain_arguments(tmp_path), eval_dataset=images(6), compute_metrics=accuracy)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_a_processor_and_positional_arguments_are_trainers(tmp_path):
    """model, args, data_collator, train_dataset, eval_dataset come in this order, as in Trainer."""
    trainer = SemCKDTrainer(vit(), config(tmp_path), None, images(), images(6), teacher_model=vit(3, 24, seed=9))
    learns(trainer)
    assert trainer.evaluate()["eval_loss"] > 0


def test_model_init_makes_the_student(tmp_path):
    trainer = SemCKDTrainer(
        args=config(tmp_path), model_init=lambda: vit(), train_dataset=images(), teacher_model=vit(3, 24, seed=9)
    )
    trainer.train()
    first, curve = weights(trainer.student), losses(trainer)
    assert not torch.equal(first["classifier.weight"], vit().classifier.weight)
    trainer.train()
    assert_same_weights(weights(trainer.student), first)
    assert losses(trainer) == curve


@pytest.mark.parametrize("weight", ["task_weight", "logit_weight", "feature_weight"])
def test_a_term_with_weight_zero_is_not_computed(tmp_path, weight):
    trainer = distiller(tmp_path, args={weight: 0.0})
    trainer.train()
    name = weight.replace("weight", "loss")
    assert not losses(trainer, name)
    others = {"task_loss", "logit_loss", "feature_loss"} - {name}
    assert all(len(losses(trainer, other)) == 3 for other in others)


def test_a_saved_student_goes_on_as_a_teacher(tmp_path):
    """Distilling in two stages, through a folder."""
    first = distiller(tmp_path / "first")
    first.train()
    first.save_model()
    second = distiller(tmp_path / "second", model=vit(1, 8), teacher_model=tmp_path / "first")
    learns(second)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "first")
    assert_same_weights(weights(second.teacher), weights(loaded))


# ---- What Trainer promises -----------------------------------------------------------------------------------------


def test_arguments_may_be_a_dictionary(tmp_path):
    args = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "max_steps": 1, "temperature": 2.0}
    trainer = SemCKDTrainer(vit(), args, train_dataset=images(), teacher_model=vit(3, 24))
    assert trainer.args.temperature == 2.0 and trainer.args.max_steps == 1


def test_generation_in_evaluation_is_refused(tmp_path):
    args = Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", predict_with_generate=True)
    with pytest.raises(ConfigurationError, match=r"(?s)predict_with_generate.*Seq2SeqTrainer"):
        SemCKDTrainer(vit(), args, train_dataset=images(), teacher_model=vit(3, 24))


def test_a_task_weight_that_would_do_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="task_weight"):
        config(tmp_path, task_weight=0.5, logit_weight=0.0, feature_weight=0.0)


def test_without_distillation_the_folder_is_trainers(tmp_path):
    for folder, make in (("ours", config), ("theirs", plain_arguments)):
        off = {"logit_weight": 0.0, "feature_weight": 0.0} if make is config else {}
        kind = SemCKDTrainer if make is config else Trainer
        kind(model=vit(), args=make(tmp_path / folder, **off), train_dataset=images()).save_model()
    names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("ours", "theirs")]
    assert names[0] == names[1]


def test_every_trial_of_a_search_has_its_own_student(tmp_path, monkeypatch):
    """Ray takes the student away between trials; `model_init` makes the next one."""
    # Neither it nor Optuna is installed: their part is to call `train` with a trial's values.
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    trainer = SemCKDTrainer(
        model_init=lambda: vit(), args=config(tmp_path), train_dataset=images(), teacher_model=vit(3, 24, seed=9)
    )
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    finals = []
    for values in ({"temperature": 2.0}, {"logit_weight": 0.0, "feature_weight": 0.0}, {"temperature": 2.0}):
        trainer.args.logit_weight, trainer.args.feature_weight = 1.0, 3.0
        trainer.model = None
        trainer.train(trial=SimpleNamespace(params=values, number=0))
        assert trainer.distillation is None or trainer.distillation.plan.temperature == 2.0
        finals.append(weights(trainer.student))
    assert_same_weights(finals[0], finals[2])
    assert trainer.student.__class__ is type(vit()) and finals[0].keys() == weights(vit()).keys()


def test_a_subclass_that_computes_its_own_loss_is_told_the_number_of_items(tmp_path):
    seen = []

    class Own(SemCKDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append(num_items_in_batch)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    args = config(tmp_path, gradient_accumulation_steps=2, max_steps=1)
    Own(vit(), args, train_dataset=images(), teacher_model=vit(3, 24)).train()
    assert [int(items) for items in seen] == [8, 8]
