import pytest

from hf_semckd.publishing.redaction import HIDDEN
from hf_semckd.publishing.settings import distillation_rows, training_rows, version_rows

SETTINGS = {
    "temperature": 4.0,
    "task_weight": 0.0,
    "logit_weight": 1.0,
    "feature_weight": 3.0,
    "association": "similarity",
    "association_temperature": 0.2,
    "association_bank": 64,
    "relation_weight": 0.0,
    "student_layers": None,
    "teacher_dtype": "auto",
    "teacher_compile": True,
    "projection_learning_rate": 1e-3,
}


def test_settings_that_were_on_are_told():
    assert distillation_rows(SETTINGS, "SemCKD") == {
        "temperature": "4",
        "task_weight": "0",
        "logit_weight": "1",
        "feature_weight": "3",
        "association": "similarity",
        "association_temperature": "0.2",
        "association_bank": "64",
        "projection_learning_rate": "0.001",
    }


@pytest.mark.parametrize(
    ("changes", "method", "gone"),
    [
        ({}, "FitNet", {"association", "association_temperature", "association_bank"}),
        (
            {},
            "KD",
            {"feature_weight", "projection_learning_rate", "association", "association_temperature"}
            | {"association_bank"},
        ),
        ({"logit_weight": 0.0}, "SemCKD", {"temperature"}),
        ({"association": "learned"}, "SemCKD", {"association_bank"}),
        ({"association": "uniform"}, "SemCKD + CRD", {"association_bank", "association_temperature"}),
    ],
)
def test_settings_that_do_not_apply_are_not(changes, method, gone):
    whole = distillation_rows(SETTINGS, "SemCKD")
    assert set(whole) - set(distillation_rows(SETTINGS | changes, method)) == gone


def test_limits_are_told_where_there_is_something_to_limit():
    settings = SETTINGS | {"max_tokens": 16, "max_grid": 4}
    limits = {"max_tokens", "max_grid"}

    def told(task=None, **changes):
        return limits & set(distillation_rows(settings | changes, "SemCKD", task))

    assert told() == told("image-classification") == limits
    assert told("text-classification") == {"max_tokens"}
    assert told(projector="convolutional") == {"max_grid"} and told(projector="pairwise") == set()


TRAINING = {
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "total_train_batch_size": 8,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "seed": 0,
    "bf16": False,
    "fp16": True,
}


def test_arguments_of_a_training_that_were_on_are_told():
    assert training_rows(TRAINING) == {
        "learning rate": "5e-05",
        "learning-rate schedule": "linear",
        "optimizer": "adamw_torch",
        "epochs": "3",
        "batch size": "8",
        "seed": "0",
        "precision": "fp16 (mixed)",
    }


def test_a_batch_is_taken_apart_and_steps_go_before_epochs():
    changes = {"max_steps": 100, "gradient_accumulation_steps": 4, "total_train_batch_size": 64}
    rows = training_rows(TRAINING | changes)
    assert rows["batch size"] == "64 (8 x 4 accumulation steps x 2 devices)"
    assert rows["steps"] == "100" and "epochs" not in rows


def test_words_that_are_not_known_are_left_out():
    assert "optimizer" not in training_rows({"optim": "/home/mallory/optimizer.py"})
    assert HIDDEN not in training_rows({"lr_scheduler_type": "x<b>"}).values()
    assert version_rows({"torch": "2.13.0+cpu", "transformers": "<b>", "processor": "Xeon @ 2 GHz"}) == {
        "hardware": "Xeon at 2 GHz"
    }
    assert version_rows({"torch": "2.13.0+cpu", "accelerator": "H200", "processor": "Xeon"}) == {
        "versions": "torch 2.13.0+cpu",
        "hardware": "H200",
    }
    assert version_rows({}) == {}
