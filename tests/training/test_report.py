"""`inspect_models` says what a training would compare, and leaves both models as they were."""

import pytest
import torch
from makers import bert, distiller, gpt2, images, resnet, texts, traces, vit, weights
from torch import nn
from transformers import YolosConfig, YolosForObjectDetection

from hf_semckd import inspect_models
from hf_semckd.errors import InputError


def batch_of(rows, count=2):
    return {name: torch.stack([torch.as_tensor(rows[n][name]) for n in range(count)]) for name in rows[0]}


def test_the_table_is_what_a_training_finds(tmp_path):
    student, teacher = vit().train(), vit(3, 24, seed=9).train()
    before = [(traces(model), weights(model).keys()) for model in (student, teacher)]
    report = inspect_models(student, teacher, batch_of(images()))
    assert [(traces(model), weights(model).keys()) for model in (student, teacher)] == before
    assert student.training and teacher.training and all(p.requires_grad for p in teacher.parameters())
    trainer = distiller(tmp_path, model=student, teacher_model=teacher)
    assert report.student.layers == trainer.student_layer_names
    assert report.teacher.layers == trainer.teacher_layer_names
    assert report.student.specs == trainer.feature_loss.student_specs
    assert report.teacher.specs == trainer.feature_loss.teacher_specs
    kinds = [[pair.kind for pair in row] for row in trainer.feature_loss.comparison.alignments]
    assert [list(row) for row in report.alignments] == kinds
    text = str(report)
    for fact in (
        "Student: ViTForImageClassification",
        "4 x 4",
        "1 in front",
        "single_label",
        "every student layer with every teacher layer, position by position",
    ):
        assert fact in text


def test_cnn_and_transformer_meet_on_a_grid():
    report = inspect_models(resnet(), vit(), batch_of(images()))
    assert {kind for row in report.alignments for kind in row} == {"grid"}
    assert report.student.modules == ["resnet.encoder.stages.0", "resnet.encoder.stages.1"]


def test_a_language_model_predicts_the_next_token_and_a_masked_one_its_own():
    rows = texts(4, labels="input", types=False)
    assert "position n predicts label n + 1" in str(inspect_models(gpt2(), gpt2(3), batch_of(rows)))
    assert not inspect_models(bert(), bert(3), batch_of(texts(4))).student.shifts_labels


def test_logits_that_cannot_be_compared_are_said_and_features_shown():
    report = inspect_models(bert(labels=2), bert(3, labels=4), batch_of(texts(4)))
    assert report.match is None and "not distilled. Teacher and student logits have different shapes" in str(report)
    assert len(report.alignments) == 2


def test_a_batch_that_a_model_cannot_take_is_refused():
    with pytest.raises(InputError, match="BertForSequenceClassification takes nothing of the batch"):
        inspect_models(bert(), vit(), batch_of(images()))
    with pytest.raises(InputError, match="no hidden states"):
        inspect_models(nn.Linear(4, 2), nn.Linear(4, 2), {"x": torch.randn(2, 4)})


def test_what_a_training_refuses_is_said():
    """The table and the training judge alike: logits of other tokens, and those of a detector."""
    batch = batch_of(texts(4, labels="input", types=False))
    theirs = {"teacher_input_ids": batch["input_ids"].roll(1, 1), "teacher_attention_mask": batch["attention_mask"]}
    other = {**batch, **theirs}
    assert "not distilled. The teacher reads other tokens" in str(inspect_models(gpt2(), gpt2(3), other))
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 16}
    config = YolosConfig(**small, image_size=[16, 16], patch_size=4, num_detection_tokens=3)
    detectors = [YolosForObjectDetection(config) for _ in range(2)]
    report = inspect_models(*detectors, {"pixel_values": torch.randn(2, 3, 16, 16)})
    assert "not distilled. The student detects objects" in str(report)
