"""Student and teacher on the same samples: the numbers by hand, and what a reader is shown."""

import base64
import io

import numpy as np
import pytest
import torch
from datasets import Dataset
from makers import Samples, bert, bert_tokens, gpt2, images, texts, vit
from PIL import Image
from torch.utils.data import IterableDataset
from transformers import ViTImageProcessor

from hf_semckd.errors import InputError
from hf_semckd.evaluation.examples import compare_predictions
from hf_semckd.evaluation.shown import shown_picture, shown_text


@torch.no_grad()
def probabilities(model, rows):
    return model.eval()(pixel_values=torch.stack([row["pixel_values"] for row in rows])).logits.softmax(-1)


def test_the_samples_that_differ_most_by_total_variation_come_first():
    rows = images(40).rows
    student, teachers = vit(), [vit(3, 24, seed=9), vit(2, 24, seed=4)]
    found = compare_predictions(student, teachers, Samples(rows), weights=(0.25, 0.75), batch_size=7)
    own, other = (
        probabilities(student, rows),
        sum(share * probabilities(model, rows) for share, model in zip((0.25, 0.75), teachers, strict=True)),
    )
    distances = (own - other).abs().sum(1) / 2
    order = distances.argsort(descending=True)[:10].tolist()
    assert [example.index for example in found.examples] == order
    first = found.examples[0]
    assert first.difference == pytest.approx(distances.max().item(), rel=1e-4)
    assert first.student == f"LABEL_{own[order[0]].argmax()}" and first.label == f"LABEL_{rows[order[0]]['labels']}"
    assert first.teacher_confidence == pytest.approx(other[order[0]].max().item(), rel=1e-4)
    assert found.agreement == pytest.approx((own.argmax(1) == other.argmax(1)).float().mean().item())
    right = (own.argmax(1) == torch.tensor([row["labels"] for row in rows])).float().mean().item()
    assert found.quality["student"] == pytest.approx(right)
    assert [entry.model for entry in found.reliability] == ["teacher", "student"]
    assert sum(own.count for own in found.reliability[1].bins) == 40


def test_a_large_data_set_is_sampled_from_its_beginning_to_its_end():
    found = compare_predictions(vit(), [vit(3, 24, seed=9)], images(30), samples=3)
    assert found.samples == 3 and {example.index for example in found.examples} == {0, 10, 20}


def test_equal_models_have_no_examples():
    found = compare_predictions(vit(), [vit()], images(6))
    assert found.agreement == 1 and not found.examples


@pytest.mark.parametrize(
    ("make", "data", "metric", "told"),
    [
        (bert_tokens, texts(8, labels="token"), "accuracy", "positions right"),
        (gpt2, texts(8, labels="input", types=False), "perplexity", "positions right"),
    ],
)
def test_positions_of_a_sample_are_averaged(make, data, metric, told):
    found = compare_predictions(make(), [make(layers=3, width=24, seed=9)], data)
    assert found.metric == metric and "mean over a sample's labeled positions" in found.measure
    assert all(told in example.student and example.label is None for example in found.examples)


def test_numbers_and_several_labels_are_told_as_such():
    rows = [{**row, "labels": float(n)} for n, row in enumerate(texts(6).rows)]
    models = [bert(labels=1, seed=seed, problem_type="regression") for seed in (0, 9)]
    found = compare_predictions(models[0], models[1:], Samples(rows))
    assert found.metric == "pearson" and not found.reliability and {e.label for e in found.examples} == set("012345")
    rows = [{**row, "labels": torch.tensor([1.0, 0.0, 1.0])} for row in rows]
    models = [bert(seed=seed, problem_type="multi_label_classification") for seed in (0, 9)]
    found = compare_predictions(models[0], models[1:], Samples(rows))
    assert found.examples[0].label == "LABEL_0, LABEL_2" and found.examples[0].student_confidence is None


class Stream(IterableDataset):
    def __iter__(self):
        return iter(images(4).rows)


@pytest.mark.parametrize("data", [Stream(), images(0), images(4, labels=None)])
def test_data_without_samples_or_labels_is_refused(data):
    with pytest.raises(InputError):
        compare_predictions(vit(), [vit(3, 24, seed=9)], data)


def test_other_classes_are_refused():
    with pytest.raises(InputError, match="cannot be compared"):
        compare_predictions(vit(), [vit(labels=5)], images(4))


def test_models_are_left_as_they_were():
    student = vit().train()
    compare_predictions(student, [vit(3, 24, seed=9)], images(4))
    assert all(module.training for module in student.modules())


# ---- What a reader is shown ----------------------------------------------------------------------------------------


class Tokenizer:
    def decode(self, ids, skip_special_tokens):
        return "" if skip_special_tokens is False else " ".join(f"w{number}" for number in ids)


def test_a_text_is_that_of_its_columns_or_of_its_tokens():
    row = Dataset.from_dict({"question": ["who?"], "context": ["me"], "label": [1], "input_ids": [[1, 2]]})[0]
    assert shown_text(row, Tokenizer()) == "who? | me"
    assert shown_text({"input_ids": [1, 2]}, Tokenizer()) == "w1 w2"
    assert shown_text({"input_ids": [1, 2]}, None) is None and shown_text((1, 2), Tokenizer()) is None
    assert shown_text({"text": "a" * 5000}, None) == "a" * 600 + "…"


def pixels(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


def test_a_picture_is_what_it_was_before_it_was_normalized():
    shown = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    processor = ViTImageProcessor(do_resize=False, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.1])
    normalized = processor(Image.fromarray(shown), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(pixels(shown_picture({"pixel_values": normalized}, processor)), shown)
    np.testing.assert_array_equal(pixels(shown_picture({"image": Image.fromarray(shown)}, None)), shown)
    assert pixels(shown_picture({"pixel_values": normalized}, None)).max() == 255
    assert pixels(shown_picture({"img": Image.new("L", (900, 300))}, None)).shape == (53, 160, 3)


@pytest.mark.parametrize(
    "row", [{}, (), {"pixel_values": np.zeros((2, 4, 4))}, {"pixel_values": np.full((3, 2, 2), np.nan)}]
)
def test_what_is_no_picture_is_not_shown(row):
    assert shown_picture(row, None) is None
