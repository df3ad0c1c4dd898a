"""models/own_loss.py: what the losses of transformers are averaged over, found without being told."""

import math

import pytest
import torch
from makers import bert, vit
from matrix.tasks import TASKS, model
from transformers import BertForQuestionAnswering
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from hf_semckd.models.own_loss import OwnLoss, count_ends, ends_loss, find_own_loss


def texts(**changes):
    generator = torch.Generator().manual_seed(0)
    whole = {"input_ids": torch.randint(3, 40, (3, 6), generator=generator)}
    whole |= {"start_positions": torch.tensor([1, 6, -4]), "end_positions": torch.tensor([2, 99, 5])}
    return {**whole, **changes}


def ends_by_hand(logits, positions):
    """Cross-entropies of the positions inside the text, one after the other; those before it are its first."""
    found = []
    for row, place in zip(logits.tolist(), positions.tolist(), strict=True):
        if place < len(row):
            total = sum(math.exp(value) for value in row)
            found.append(-math.log(math.exp(row[max(place, 0)]) / total))
    return found


def test_ends_are_two_means_over_their_own_answers():
    generator = torch.Generator().manual_seed(1)
    start, end = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    batch = texts()
    first, second = ends_by_hand(start, batch["start_positions"]), ends_by_hand(end, batch["end_positions"])
    assert count_ends(batch).tolist() == [len(first), len(second)] == [2, 2]
    outputs = QuestionAnsweringModelOutput(start_logits=start, end_logits=end)
    found = ends_loss(outputs, batch, torch.tensor([4.0, 5.0]))
    assert float(found) == pytest.approx((sum(first) / 4 + sum(second) / 5) / 2)
    assert count_ends({"input_ids": batch["input_ids"]}).tolist() == [0, 0]


class OtherEnds(BertForQuestionAnswering):
    """Its loss is another one than everybody's."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        if found.loss is not None:
            found.loss = found.loss + found.start_logits.square().mean() + 1
        return found


@pytest.mark.parametrize(("kind", "proven"), [(BertForQuestionAnswering, True), (OtherEnds, False)])
@torch.no_grad()
def test_the_loss_of_answers_is_tried(kind, proven):
    student, batch = bert(labels=2, head=kind).eval(), texts()
    outputs = student(input_ids=batch["input_ids"])
    assert find_own_loss(student, outputs, outputs.start_logits, batch, "spans") == OwnLoss(finds_ends=proven)
    del batch["end_positions"]
    assert find_own_loss(student, outputs, outputs.start_logits, batch, "spans") == OwnLoss()


@pytest.mark.parametrize(
    ("changes", "channels", "expected"),
    [
        ({"semantic_loss_ignore_index": 255}, 3, OwnLoss((255,), "semantic_loss_ignore_index")),
        ({"semantic_loss_ignore_index": 7}, 3, OwnLoss((7,), "semantic_loss_ignore_index")),
        ({"semantic_loss_ignore_index": 255}, 1, OwnLoss((), "semantic_loss_ignore_index")),
        ({"loss_ignore_index": 254}, 3, OwnLoss((254,), "loss_ignore_index")),
        # A model of one's own may know either.
        ({}, 3, OwnLoss((-100, 255))),
        ({}, 300, OwnLoss()),
    ],
)
def test_the_ignored_pixel_is_the_configurations(changes, channels, expected):
    student = vit()
    for name, value in changes.items():
        setattr(student.config, name, value)
    assert find_own_loss(student, {}, torch.zeros(2, channels, 4, 4), {}, "single_label") == expected
    # A classifier of whole pictures ignores -100 all the same.
    assert find_own_loss(student, {}, torch.zeros(2, channels), {}, "single_label") == OwnLoss()


@pytest.mark.parametrize(
    ("name", "reduction", "adds"),
    [
        ("Wav2Vec2ForCTC", "sum", True),
        ("Wav2Vec2ForCTC", "mean", False),
        ("Wav2Vec2ForAudioFrameClassification", "sum", False),
    ],
)
def test_a_sum_is_told_from_a_mean(name, reduction, adds):
    student = model(name, "wav2vec2", ctc_loss_reduction=reduction)(2, 16, 0)
    assert find_own_loss(student, {}, torch.zeros(2, 9, 4), {}, "frames").adds is adds


def test_a_list_of_objects_has_a_loss_of_its_own():
    rows = TASKS["object-detection"].rows()[:2]
    assert not find_own_loss(vit(), {}, None, {"labels": [row["labels"] for row in rows]}, "single_label").divisible
    assert not find_own_loss(vit(), {}, None, {"mask_labels": [1, 2]}, "single_label").divisible
    assert find_own_loss(vit(), {}, None, {"labels": torch.zeros(2)}, "single_label").divisible
