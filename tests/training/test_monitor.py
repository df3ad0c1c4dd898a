"""What is shown of a training: loss terms and association, averaged rightly, and a picture that may fail."""

import json
import logging
import math
import sys
from collections import deque

import numpy as np
import pytest
import torch
from makers import (
    IMAGE,
    LABELS,
    Samples,
    bert,
    bert_tokens,
    config,
    distiller,
    gpt2,
    images,
    losses,
    resnet,
    texts,
    vit,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from hf_semckd import DistillationTrainer, SemCKDConfig, SemCKDTrainer
from hf_semckd.losses import FeatureLoss, FeatureLossOutput

TERMS = ("task_loss", "logit_loss", "feature_loss")
TEMPERATURE, SHARPNESS = 4.0, 0.2
# Nothing moves, so that every step can be computed from the models as they are.
STILL = {
    "learning_rate": 0.0,
    "projection_learning_rate": 1e-30,
    "target_norm": "none",
    "max_tokens": 0,
    # By hand, for each sample alone.
    "relation_weight": 0.0,
    "association_bank": 0,
    "max_steps": -1,
    "num_train_epochs": 1,
}


@pytest.fixture
def no_picture(monkeypatch):
    """Drawing takes longer than training."""
    monkeypatch.setattr("hf_semckd.training.callbacks.save_association_plot", lambda *_, **__: None)


class Ordered(SemCKDTrainer):
    """Takes the samples in their order."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def ordered(folder, samples=11, **changes):
    return Ordered(vit(), config(folder, **changes), train_dataset=images(samples), teacher_model=vit(3, 24, seed=9))


# ---- The same numbers by hand ------------------------------------------------------------------------------------


def softmax(row):
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def centred_rows(tokens):
    """Cosines between all samples of a batch, by their patches (CLS is no patch), each row less its mean."""
    rows = [sample[1:].ravel() / np.linalg.norm(sample[1:]) for sample in tokens]
    similarity = np.array([[float(a @ b) for b in rows] for a in rows])
    return similarity - similarity.mean(1, keepdims=True)


def association_by_hand(student, teacher):
    """Softmax over teacher layers of how alike two layers see each sample among its batch: (B, S, T)."""
    left, right = [centred_rows(layer) for layer in student], [centred_rows(layer) for layer in teacher]
    weights = np.zeros((len(student[0]), len(student), len(teacher)))
    for i in range(len(weights)):
        for s, a in enumerate(left):
            lengths = [np.linalg.norm(a[i]) * np.linalg.norm(b[i]) for b in right]
            # A sample that is alone in its batch has nothing to be compared with.
            cosines = [a[i] @ b[i] / length if length > 0 else 0.0 for b, length in zip(right, lengths, strict=True)]
            weights[i, s] = softmax(np.array(cosines) / SHARPNESS)
    return weights


def by_hand(trainer, micro, parts):
    """Return one row of terms a step, computed sample by sample, and all samples' association weights."""
    rows, batches, weights = list(trainer.train_dataset), [], []
    for first in range(0, len(rows), micro):
        batches.append([first + index for index in range(min(micro, len(rows) - first))])
    samples = [terms for batch in batches for terms in batch_by_hand(trainer, [rows[i] for i in batch], weights)]
    size = micro * parts
    steps = [np.mean(samples[first : first + size], axis=0) for first in range(0, len(rows), size)]
    return [dict(zip(TERMS, step, strict=True)) for step in steps], np.array(weights)


def batch_by_hand(trainer, rows, weights):
    pixels, labels = torch.stack([row["pixel_values"] for row in rows]), [row["labels"] for row in rows]
    with torch.no_grad():
        outputs = [
            m.eval()(pixel_values=pixels, output_hidden_states=True) for m in (trainer.student, trainer.teacher)
        ]
    logits = [output.logits.double().numpy() for output in outputs]
    student, teacher = ([state.double().numpy() for state in output.hidden_states[1:]] for output in outputs)
    linear = [trainer.feature_loss.projection[s]["24"] for s in range(len(student))]
    matrices = [(entry.weight.detach().double().numpy(), entry.bias.detach().double().numpy()) for entry in linear]
    association = association_by_hand(student, teacher)
    weights.extend(association)
    results = []
    for i in range(len(rows)):
        q, p = (softmax(entry[i] / TEMPERATURE) for entry in logits)
        task = -math.log(softmax(logits[0][i])[labels[i]])
        kd = TEMPERATURE**2 * sum(p[c] * math.log(p[c] / q[c]) for c in range(len(p)))
        feature = 0.0
        for s, (matrix, bias) in enumerate(matrices):
            projected = student[s][i] @ matrix.T + bias
            errors = [((projected - layer[i]) ** 2).mean() for layer in teacher]
            feature += association[i, s] @ errors / len(student)
        results.append((task, kd, feature))
    return results


def entropy(weights):
    return float(np.mean([-sum(w * math.log(w) for w in row) for sample in weights for row in sample]))


@pytest.mark.parametrize(("micro", "parts"), [(4, 1), (3, 2), (2, 3)])
def test_logged_terms_are_means_over_the_window(tmp_path, no_picture, micro, parts):
    """Eleven samples: the last step and its last micro-batch are smaller, and count by their samples."""
    args = {**STILL, "per_device_train_batch_size": micro, "gradient_accumulation_steps": parts}
    trainer = ordered(tmp_path, logging_steps=1, **args)
    steps, weights = by_hand(trainer, micro, parts)
    trainer.train()
    for name in TERMS:
        assert losses(trainer, name) == pytest.approx([step[name] for step in steps], rel=2e-4), name
    whole = ordered(tmp_path, logging_steps=len(steps), **args)
    whole.train()
    row = next(row for row in whole.state.log_history if "loss" in row)
    for name in TERMS:
        assert row[name] == pytest.approx(np.mean([step[name] for step in steps]), rel=2e-4), name
    assert row["association/entropy"] == pytest.approx(entropy(weights), rel=1e-4)
    np.testing.assert_allclose(whole.association(), weights.mean(0), atol=1e-5)
    np.testing.assert_allclose(whole.association().sum(1), 1.0, atol=1e-6)
    assert row["association"] == whole.association().tolist()


def test_each_window_has_the_association_of_its_own_samples(tmp_path, no_picture):
    trainer = ordered(tmp_path, samples=12, logging_steps=1, **STILL)
    _, weights = by_hand(trainer, 4, 1)
    trainer.train()
    rows = losses(trainer, "association")
    for step in range(3):
        np.testing.assert_allclose(rows[step], weights[4 * step : 4 * step + 4].mean(0), atol=1e-5)
    entropies = losses(trainer, "association/entropy")
    assert entropies == pytest.approx([entropy(weights[4 * step : 4 * step + 4]) for step in range(3)], rel=1e-4)
    assert len(set(entropies)) == 3


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("text", [False, True])
def test_loss_is_the_weighted_sum_of_its_terms(tmp_path, no_picture, parts, text):
    factors = {"task_weight": 0.5, "logit_weight": 2.0, "feature_weight": 3.0}
    args = {**factors, "gradient_accumulation_steps": parts, "per_device_train_batch_size": 3, "logging_steps": 2}
    models = {"model": bert(), "teacher_model": bert(3, 24, seed=9), "train_dataset": texts(22)} if text else {}
    trainer = distiller(tmp_path, args={**args, "max_steps": 6}, **models)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        expected = sum(weight * row[name.replace("weight", "loss")] for name, weight in factors.items())
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


# ---- The association ---------------------------------------------------------------------------------------------


def test_association_is_none_until_there_is_one(tmp_path, no_picture):
    trainer = distiller(tmp_path)
    assert trainer.association() is None
    trainer.train()
    assert trainer.association().shape == (2, 3)
    logits_only = distiller(tmp_path, args={"feature_weight": 0.0})
    logits_only.train()
    assert logits_only.association() is None
    assert not losses(logits_only, "association") and not losses(logits_only, "association/entropy")
    assert not (tmp_path / "association.png").exists()


def test_the_association_given_out_is_a_copy(tmp_path, no_picture):
    trainer = distiller(tmp_path)
    trainer.train()
    kept = trainer.association().copy()
    trainer.association()[:] = 7
    np.testing.assert_array_equal(trainer.association(), kept)


@pytest.mark.parametrize("association", ["similarity", "learned", "uniform", "one_to_one"])
def test_rows_sum_to_one_whatever_the_association(tmp_path, no_picture, association):
    trainer = distiller(tmp_path, args={"association": association})
    trainer.train()
    np.testing.assert_allclose(trainer.association().sum(1), 1.0, atol=1e-6)
    nats = losses(trainer, "association/entropy")
    assert all(-1e-9 <= value <= math.log(3) + 1e-6 for value in nats)
    if association == "uniform":
        assert nats == pytest.approx([math.log(3)] * 3)
    if association == "one_to_one":
        assert nats == pytest.approx([0.0] * 3) and set(trainer.association().ravel()) == {0.0, 1.0}


def test_steps_after_the_last_log_are_not_lost(tmp_path, no_picture):
    """Five steps, logged every two: the association is that of the fifth."""
    every, seldom = (distiller(tmp_path, args={"max_steps": 5, "logging_steps": steps}) for steps in (1, 2))
    every.train()
    seldom.train()
    np.testing.assert_allclose(seldom.association(), losses(every, "association")[-1])
    assert len(losses(seldom)) == 2


def test_a_training_too_short_to_be_logged_has_an_association(tmp_path, no_picture):
    trainer = distiller(tmp_path, args={"logging_steps": 500})
    trainer.train()
    assert not losses(trainer) and trainer.association().shape == (2, 3)


class Listener(TrainerCallback):
    """Keeps what is logged."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **_):
        self.seen.append(dict(logs))


def test_history_keeps_the_association_and_logs_do_not_show_it(tmp_path, no_picture):
    listener = Listener()
    args = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    trainer = distiller(tmp_path, callbacks=[listener], eval_dataset=images(4), args=args)
    trainer.train()
    assert {"loss", "association/entropy", *TERMS} <= set(listener.seen[0])
    assert not any("association" in logs for logs in listener.seen)
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert evaluations and not any("association" in row or "task_loss" in row for row in evaluations)
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["log_history"][0]["association"] == trainer.state.log_history[0]["association"]


def test_a_resumed_window_starts_at_the_checkpoint(tmp_path, no_picture):
    """Checkpoint after step 3 of a window of two: the next log, at step 4, is of step 4 alone."""
    step_by_step = ordered(tmp_path / "every", 20, max_steps=5)
    step_by_step.train()
    args = {"max_steps": 5, "logging_steps": 2, "save_strategy": "steps", "save_steps": 3}
    first = ordered(tmp_path / "windows", 20, **args)
    first.train()
    resumed = ordered(tmp_path / "windows", 20, **args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "windows" / "checkpoint-3"))
    names = (*TERMS, "loss", "association/entropy", "association")
    at_four = next(row for row in resumed.state.log_history if row["step"] == 4 and "loss" in row)
    expected = next(row for row in step_by_step.state.log_history if row["step"] == 4)
    for name in names:
        np.testing.assert_allclose(at_four[name], expected[name], rtol=1e-6, err_msg=name)


def test_a_second_training_starts_a_new_window(tmp_path, no_picture):
    trainer = ordered(tmp_path, **STILL, logging_steps=3)
    trainer.train()
    first = losses(trainer, "task_loss")
    trainer.train()
    assert losses(trainer, "task_loss")[-1:] == pytest.approx(first)


# ---- A collapse is told, once ------------------------------------------------------------------------------------


class OnOneLayer(FeatureLoss):
    """Leans on the first teacher layer, for every sample alike."""

    upper_bound = 1.0

    def __init__(self, weights=(1.0, 0.0, 0.0)):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.weights = torch.tensor([[weights, weights]])

    def compare(self, student_features, targets, student_mask):
        per_sample = self.scale**2 * student_features[0].flatten(1).square().mean(1)
        return FeatureLossOutput(per_sample.mean(), per_sample, self.weights.expand(len(per_sample), -1, -1))


def warnings_of_collapse(caplog):
    return [entry.getMessage() for entry in caplog.records if "collapsed" in entry.getMessage()]


def test_a_collapse_is_told_once_with_the_layer_and_the_way_out(tmp_path, no_picture, caplog):
    trainer = DistillationTrainer(
        vit(), config(tmp_path), teacher_model=vit(3, 24), train_dataset=images(), feature_loss=OnOneLayer()
    )
    trainer.train()
    assert len(losses(trainer)) == 3
    told = warnings_of_collapse(caplog)
    assert len(told) == 1
    assert "teacher layer 1" in told[0] and "association='similarity'" in told[0]
    assert [entry.levelno for entry in caplog.records if "collapsed" in entry.getMessage()] == [logging.WARNING]


def test_weights_short_of_the_bound_are_no_collapse(tmp_path, no_picture, caplog):
    loss = OnOneLayer((0.8, 0.1, 0.1))
    DistillationTrainer(
        vit(), config(tmp_path), teacher_model=vit(3, 24), train_dataset=images(), feature_loss=loss
    ).train()
    assert not warnings_of_collapse(caplog)


def published(folder):
    args = SemCKDConfig.published(
        str(folder),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-6,
        projection_learning_rate=1e-9,
    )
    return SemCKDTrainer(vit(), args, teacher_model=vit(3, 24, seed=9), train_dataset=images())


def test_a_collapse_of_the_published_form(tmp_path, no_picture, caplog):
    """All queries point where the second key does, and the other keys the opposite way: as far as cosines can go."""
    trainer = published(tmp_path)
    with torch.no_grad():
        for index, network in enumerate([*trainer.feature_loss.query, *trainer.feature_loss.key]):
            network[-1].weight.zero_()
            network[-1].bias.fill_(-1.0 if index in (2, 4) else 1.0)
    trainer.train()
    bound = math.e / (math.e + 2 / math.e)
    np.testing.assert_allclose(trainer.association()[:, 1], bound, rtol=1e-4)
    told = warnings_of_collapse(caplog)
    assert len(told) == 1 and "teacher layer 2" in told[0]


@pytest.mark.parametrize("association", ["similarity", "learned", "uniform", "last", "one_to_one"])
def test_healthy_and_fixed_associations_are_not_told(tmp_path, no_picture, caplog, association):
    distiller(tmp_path, args={"association": association}).train()
    published(tmp_path).train()
    assert not warnings_of_collapse(caplog)


# ---- A student that learned nothing is told ----------------------------------------------------------------------


def told_of_idle_student(folder, caplog, **args):
    distiller(folder, args={"max_steps": 50, "logging_steps": 25, **args}).train()
    return [entry.getMessage() for entry in caplog.records if "not to have learned its task" in entry.getMessage()]


def test_a_student_at_chance_is_told_with_the_ways_out(tmp_path, no_picture, caplog):
    told = told_of_idle_student(tmp_path, caplog, learning_rate=0.0)
    assert len(told) == 1
    assert f"classes give {math.log(LABELS):.3f}" in told[0]
    assert "Lower feature_weight (it is 3)" in told[0] and "(these were 50)" in told[0]


@pytest.mark.parametrize(
    "args",
    [
        {"learning_rate": 1e-2},
        {"learning_rate": 0.0, "max_steps": 49},
        {"learning_rate": 0.0, "feature_weight": 0.0},
        {"learning_rate": 0.0, "task_weight": 0.0},
    ],
)
def test_who_learned_or_could_not_learn_is_not_told(tmp_path, no_picture, caplog, args):
    assert not told_of_idle_student(tmp_path, caplog, **args)


class OneOutput(nn.Module):
    """A plain regression: logits of one dimension."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3 * IMAGE * IMAGE, 8), nn.Linear(8, 1)

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.body(pixel_values.flatten(1))).squeeze(1)
        loss = None if labels is None else nn.functional.mse_loss(logits, labels.float())
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("logit_weight", [0.0, 1.0])
def test_a_student_without_classes_trains_to_the_end(tmp_path, no_picture, caplog, logit_weight):
    args = {
        "logit_weight": logit_weight,
        "student_layers": ["body"],
        "teacher_layers": ["body"],
        "relation_weight": 0.0,
    }
    args |= {"max_steps": 50, "logging_steps": 25, "learning_rate": 0.0}
    trainer = distiller(tmp_path, args=args, model=OneOutput(), teacher_model=OneOutput())
    assert trainer.train().global_step == 50
    assert not [entry for entry in caplog.records if "learned its task" in entry.getMessage()]


def test_a_task_loss_above_chance_is_another_matter(tmp_path, no_picture, caplog):
    trainer = distiller(tmp_path, args={"max_steps": 1})
    trainer.train()
    trainer.state.global_step = 50
    for share, told in ((1.0, True), (1.2, False), (0.9, False)):
        caplog.clear()
        trainer.distillation.monitor.task_losses = deque([(50, share * math.log(LABELS))])
        trainer.distillation.monitor.warn_of_idle_student(trainer.state.global_step, trainer.args.learning_rate)
        assert any("learned its task" in entry.getMessage() for entry in caplog.records) is told


@pytest.mark.parametrize(("every", "kept"), [(1, 20), (7, 3), (30, 1)])
def test_a_student_is_judged_by_more_than_a_batch(tmp_path, no_picture, every, kept):
    trainer = distiller(tmp_path, args={"max_steps": 60, "logging_steps": every})
    trainer.train()
    windows = [row for row in trainer.state.log_history if "task_loss" in row]
    # The last window may have ended with the training, and not with a log.
    assert len(trainer.distillation.monitor.task_losses) in (kept, kept + 1)
    assert sum(steps for steps, _ in trainer.distillation.monitor.task_losses) >= 20
    assert windows[-1]["task_loss"] in [loss for _, loss in trainer.distillation.monitor.task_losses]


def test_steps_before_a_resume_are_not_counted(tmp_path, no_picture, caplog):
    args = {"learning_rate": 0.0, "save_strategy": "steps", "save_steps": 40, "logging_steps": 5}
    distiller(tmp_path, args={"max_steps": 40, **args}).train()
    distiller(tmp_path, args={"max_steps": 60, **args}).train(resume_from_checkpoint=True)
    assert not [entry for entry in caplog.records if "learned its task" in entry.getMessage()]


def test_a_second_training_is_told_of_by_itself(tmp_path, no_picture, caplog):
    trainer = distiller(tmp_path, args={"max_steps": 50, "learning_rate": 0.0})
    for _ in range(2):
        caplog.clear()
        trainer.train()
        assert len([entry for entry in caplog.records if "learned its task" in entry.getMessage()]) == 1


def test_a_student_that_gets_the_teachers_classifier_is_not_told(tmp_path, no_picture, caplog):
    args = config(tmp_path, max_steps=50, learning_rate=0.0)
    teacher = resnet((8, 16), seed=9)
    DistillationTrainer(resnet(), args, teacher_model=teacher, train_dataset=images(), feature_loss="simkd").train()
    assert not [entry for entry in caplog.records if "learned its task" in entry.getMessage()]


@pytest.mark.parametrize(("make", "labels"), [(bert_tokens, "token"), (gpt2, "input")])
def test_a_student_of_tokens_is_not_told(tmp_path, no_picture, caplog, make, labels):
    args = config(tmp_path, max_steps=50, learning_rate=0.0)
    data = texts(labels=labels, types=make is bert_tokens)
    SemCKDTrainer(make(), args, teacher_model=make(layers=3, width=24, seed=9), train_dataset=data).train()
    assert not [entry for entry in caplog.records if "learned its task" in entry.getMessage()]


def test_the_last_window_counts_even_if_it_was_not_logged(tmp_path, no_picture, caplog):
    assert told_of_idle_student(tmp_path, caplog, learning_rate=0.0, logging_steps=1000)


# ---- The picture, and TensorBoard --------------------------------------------------------------------------------


def test_tensorboard_gets_terms_weights_and_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = distiller(tmp_path, args={"report_to": "tensorboard"})
    trainer.train()
    assert (tmp_path / "association.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents.*"))), size_guidance={"images": 0})
    events.Reload()
    pictures = events.Images("association")
    assert [picture.step for picture in pictures] == [1, 2, 3]
    assert all(picture.width > 100 and picture.height > 100 for picture in pictures)
    for name in ("loss", *TERMS, "association/entropy"):
        shown = [entry.value for entry in events.Scalars(f"train/{name}")]
        assert shown == pytest.approx(losses(trainer, name), rel=1e-5), name
    rows = losses(trainer, "association")
    for s in range(2):
        for t in range(3):
            shown = events.Scalars(f"association/student {s + 1}/teacher {t + 1}")
            assert [entry.step for entry in shown] == [1, 2, 3]
            assert [entry.value for entry in shown] == pytest.approx([row[s][t] for row in rows], rel=1e-5)


def without_matplotlib(monkeypatch, folder):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def with_a_folder_in_the_way(monkeypatch, folder):
    (folder / "association.png" / "inside").mkdir(parents=True)


def with_a_bug_in_matplotlib(monkeypatch, folder):
    def broken(*_, **__):
        raise AttributeError("module 'PIL.Image' has no attribute 'ANTIALIAS'")

    monkeypatch.setattr("hf_semckd.training.callbacks.save_association_plot", broken)


@pytest.mark.parametrize("trouble", [without_matplotlib, with_a_folder_in_the_way, with_a_bug_in_matplotlib])
def test_a_picture_that_fails_costs_the_picture_alone(tmp_path, monkeypatch, caplog, trouble):
    trouble(monkeypatch, tmp_path)
    trainer = distiller(tmp_path, args={"save_strategy": "steps", "save_steps": 3})
    trainer.train()
    assert len(losses(trainer)) == 3 and trainer.association().shape == (2, 3)
    assert (tmp_path / "checkpoint-3" / "model.safetensors").is_file()
    told = [entry.getMessage() for entry in caplog.records if "picture" in entry.getMessage()]
    assert len(told) == 1 and "training is not affected" in told[0]


@pytest.mark.parametrize("association", ["last", "uniform"])
def test_fixed_weights_have_a_picture_too(tmp_path, caplog, association):
    distiller(tmp_path, args={"association": association, "max_steps": 1}).train()
    assert (tmp_path / "association.png").read_bytes().startswith(b"\x89PNG")
    assert not caplog.records


def test_a_failed_picture_leaves_tensorboard_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    without_matplotlib(monkeypatch, tmp_path)
    trainer = distiller(tmp_path, args={"report_to": "tensorboard"})
    trainer.train()
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents.*"))))
    events.Reload()
    assert len(events.Scalars("train/loss")) == 3 and "association" not in events.Tags()["images"]


# ---- Labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize(
    ("labeled", "logged", "weight", "told"),
    [((), 1, 1.0, 1), ((), 30, 1.0, 1), ((5,), 1, 1.0, 0), ((5,), 30, 1.0, 0), ((), 1, 0.0, 0), ((0, 5), 1, 1.0, 0)],
)
def test_labels_that_never_count_are_told_once(labeled, logged, weight, told, chunk, tmp_path, no_picture, caplog):
    """Twelve samples, one a step."""
    rows = [{**row, "labels": torch.full((10,), -100)} for row in texts(12, labels="input", types=False).rows]
    for index in labeled:
        rows[index]["labels"][1] = 3
    args = {"max_steps": 12, "per_device_train_batch_size": 1, "logging_steps": logged, "logit_chunk_size": chunk}
    made = Ordered(
        gpt2(), config(tmp_path, **args, task_weight=weight), train_dataset=Samples(rows), teacher_model=gpt2(3, 24, 9)
    )
    with caplog.at_level(logging.WARNING, logger="hf_semckd"):
        made.train()
    assert sum("No label counted in the last" in entry for entry in caplog.messages) == told
    assert not any("items" in row for row in made.state.log_history)
