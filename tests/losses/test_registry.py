"""Every feature loss in the trainer, on every kind of model: it learns, resumes, caches, and leaves no trace."""

import math

import pytest
import torch
from makers import config, images, losses, plain_arguments, resnet, traces, weights
from methods import CASES, FAMILIES, NAMES, REFUSED, make
from transformers import AutoModelForImageClassification, Trainer

from hf_semckd import DistillationTrainer
from hf_semckd.errors import ConfigurationError
from hf_semckd.losses import FEATURE_LOSSES, CombinedLoss, SemCKDLoss


@pytest.mark.parametrize(("name", "family"), CASES)
def test_every_method_trains_every_family_on_ragged_batches(tmp_path, name, family):
    trainer = make(tmp_path, name, family, max_steps=4)
    before = weights(trainer.student)
    marks = traces(trainer.student)
    trainer.train()
    seen = losses(trainer, "feature_loss")
    assert len(seen) == 4 and all(math.isfinite(value) for value in seen)
    assert any(not torch.equal(before[key], value) for key, value in weights(trainer.student).items())
    assert traces(trainer.student) == marks
    # Only what its weights carry can tell the student from a plain one.
    assert set(weights(trainer.student)) == set(before)


@pytest.mark.parametrize(("name", "family"), sorted(REFUSED))
def test_a_method_says_before_training_what_it_is_not_for(tmp_path, name, family):
    with pytest.raises(ConfigurationError) as caught:
        make(tmp_path, name, family)
    text = str(caught.value)
    assert REFUSED[name, family] in text and all(part in text for part in ("received: ", "expected: ", "what to do: "))


@pytest.mark.parametrize(
    ("name", "family"), [(name, "bert" if name in ("pkd", "minilm") else "resnet") for name in NAMES]
)
def test_a_cached_teacher_gives_the_live_losses(tmp_path, name, family):
    live = make(tmp_path, name, family, max_steps=6)
    live.train()
    cached = make(tmp_path, name, family, max_steps=6, teacher_cache_dir=str(tmp_path / "cache"))
    cached.train()
    assert losses(cached) == pytest.approx(losses(live), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_resuming_goes_on_where_it_stopped(tmp_path, name):
    family = "bert" if name in ("pkd", "minilm") else "resnet"
    saving = {"save_strategy": "steps", "save_steps": 3}
    # As published: else its own classifier trains too, and a resumed run goes on from the one that replaced it.
    alone = {"task_weight": 0.0, "logit_weight": 0.0} if name == "simkd" else {}
    whole = make(tmp_path, name, family, max_steps=6, **saving, **alone)
    whole.train()
    resumed = make(tmp_path, name, family, max_steps=6, **alone)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for key, value in weights(whole.student).items():
        torch.testing.assert_close(weights(resumed.student)[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_weight_of_its_own_a_method_has_the_published_one(tmp_path, name):
    family = "bert" if name in ("pkd", "minilm") else "resnet"
    trainer = make(tmp_path, name, family, max_steps=1, task_weight=0.0, logit_weight=0.0)
    # Of a ResNet and another one.
    expected = 100.0 if name.startswith("semckd") else FEATURE_LOSSES[name].default_weight
    assert trainer.distillation.plan.feature_weight == trainer.distillation_settings()["feature_weight"] == expected
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "feature_loss" in entry]
    assert entry["loss"] == pytest.approx(expected * entry["feature_loss"], rel=1e-3)


def test_a_given_weight_wins(tmp_path):
    assert make(tmp_path, "sp", "resnet", feature_weight=2.5).distillation.plan.feature_weight == 2.5


def test_kd_is_logits_alone(tmp_path):
    first, second = make(tmp_path, "kd", "vit"), make(tmp_path, None, "vit")
    first.train()
    second.train()
    assert losses(first) == losses(second) and first.feature_loss is None


@pytest.mark.parametrize("name", ["fitnets", "semckd+", "semckd+none", "+"])
def test_an_unknown_method_lists_the_known_ones(tmp_path, name):
    with pytest.raises(ConfigurationError, match=r"'fitnet'.*'crd'"):
        make(tmp_path, name, "vit")


def test_methods_that_compare_different_layers_cannot_be_joined(tmp_path):
    with pytest.raises(ConfigurationError, match="compare different layers"):
        make(tmp_path, "semckd+minilm", "bert")


# Joined losses


def joined():
    torch.manual_seed(0)
    shapes = [(3, 4, 4), (5, 2, 2)], [(6, 4, 4), (7, 2, 2)]
    return CombinedLoss([FEATURE_LOSSES["sp"](*shapes), FEATURE_LOSSES["rkd"](*shapes)])


def test_joined_losses_keep_the_ratio_of_their_own_weights():
    loss, generator = joined(), torch.Generator().manual_seed(1)
    features = [[torch.randn(4, *shape, generator=generator) for shape in side] for side in
                ([(3, 4, 4), (5, 2, 2)], [(6, 4, 4), (7, 2, 2)])]  # fmt: skip
    alone = [part(*features).per_sample for part in loss.losses]
    out = loss(*features)
    torch.testing.assert_close(3000 * out.per_sample, 3000 * alone[0] + 1 * alone[1])
    torch.testing.assert_close(out.total, out.per_sample.mean())
    assert loss.default_weight == 3000 and loss.title == "SP + RKD"


@pytest.mark.parametrize("names", [(), ("sp",), ("sp", "simkd")])
def test_what_cannot_be_joined_is_refused(names):
    shapes = [(5, 2, 2)], [(7, 2, 2)]
    with pytest.raises(ConfigurationError, match="cannot be joined"):
        CombinedLoss([FEATURE_LOSSES[name](*shapes) for name in names])


def test_a_joined_semckd_still_shows_its_association(tmp_path):
    trainer = make(tmp_path, "semckd+crd", "vit")
    trainer.train()
    assert trainer.association().shape == (2, 4) and isinstance(trainer.feature_loss.losses[0], SemCKDLoss)


# SimKD: the student ends with the teacher's classifier


def simkd(folder, **arguments):
    return make(folder, "simkd", "resnet", task_weight=0.0, logit_weight=0.0, max_steps=4, **arguments)


def by_hand(trainer, batch):
    """The teacher's classifier on the projected average of the student's last map."""
    with torch.no_grad():
        states = trainer.student.eval()(batch, output_hidden_states=True).hidden_states
        projection = trainer.feature_loss.projection
        head = trainer.teacher.classifier[-1]
        rows = []
        for sample in states[-1]:
            average = sum(sample[:, r, c] for r in range(sample.shape[1]) for c in range(sample.shape[2]))
            average = average / (sample.shape[1] * sample.shape[2])
            rows.append(head.weight @ (projection.weight @ average + projection.bias) + head.bias)
    return torch.stack(rows)


def test_after_training_the_student_ends_with_the_teachers_classifier(tmp_path):
    trainer = simkd(tmp_path)
    trainer.train()
    batch = torch.stack([images(6)[index]["pixel_values"] for index in range(6)])
    torch.testing.assert_close(trainer.student.eval()(batch).logits, by_hand(trainer, batch), rtol=1e-4, atol=1e-5)


def test_it_is_there_whenever_the_student_is_evaluated_or_saved(tmp_path):
    student, make_teacher, data = FAMILIES["resnet"]
    args = {"task_weight": 0.0, "logit_weight": 0.0, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    trainer = DistillationTrainer(
        student(),
        config(tmp_path, save_steps=2, **{**args, "save_strategy": "steps"}),
        teacher_model=make_teacher(),
        train_dataset=data(),
        eval_dataset=images(6),
        feature_loss="simkd",
    )
    trainer.train()
    scores = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    for step, score in zip((2, 4), scores, strict=True):
        saved = AutoModelForImageClassification.from_pretrained(tmp_path / f"checkpoint-{step}")
        plain = Trainer(saved, plain_arguments(tmp_path / "plain"), eval_dataset=images(6))
        assert plain.evaluate()["eval_loss"] == pytest.approx(score, rel=1e-4)
    assert scores[0] != scores[1]


def test_evaluating_it_changes_no_training(tmp_path):
    still = make(tmp_path, "simkd", "resnet", max_steps=4)
    seen = make(tmp_path, "simkd", "resnet", max_steps=4, save_strategy="steps", save_steps=1)
    still.train()
    seen.train()
    assert losses(seen) == losses(still)


def test_a_classifier_that_reads_something_else_is_refused(tmp_path):
    teacher = resnet((8, 16), seed=9)
    teacher.resnet.pooler = torch.nn.AdaptiveMaxPool2d((1, 1))
    with pytest.raises(ConfigurationError, match="reads the average of the last map; the teacher's does not"):
        make(tmp_path, "simkd", "resnet", teacher=teacher)


@pytest.mark.parametrize(("family", "expected"), [("vit", 3.0), ("resnet to vit", 3.0), ("bert", 3.0)])
def test_semckd_weighs_features_by_the_kind_of_layers(tmp_path, family, expected):
    trainer = make(tmp_path, "semckd", family)
    assert trainer.distillation.plan.feature_weight == expected and FEATURE_LOSSES["semckd"].default_weight == 3.0
    assert make(tmp_path, "semckd", family, feature_weight=2.0).distillation.plan.feature_weight == 2.0
