"""Decisions about samples, tokens, pixels, spans and numbers, against loops by hand; which task a model has."""

import pytest
import torch
from matrix.tasks import TASKS
from torch.utils.data import default_collate

from hf_semckd.errors import InputError
from hf_semckd.evaluation.decisions import Labeling, collect_decisions, find_labeling
from hf_semckd.models.outputs import logits_of

EXPECTED = {
    "sequence-classification": Labeling("classes"),
    "token-classification": Labeling("classes"),
    "multi-label": Labeling("multi_label"),
    "regression": Labeling("regression"),
    "multiple-choice": Labeling("classes"),
    "question-answering": Labeling("spans"),
    "masked-lm": Labeling("words"),
    "causal-lm": Labeling("words", shifted=True),
    "causal-lm-packed": Labeling("words", shifted=True),
    "seq2seq": Labeling("words"),
    "seq2seq-labels": Labeling("words"),
    "image-classification": Labeling("classes"),
    "segmentation": Labeling("classes", ignored=255),
    "speech-seq2seq": Labeling("words"),
    "image-text-to-text": Labeling("words", shifted=True),
    "vision-encoder-decoder": Labeling("words"),
    "plain-teacher": Labeling("classes"),
}


def batch_of(task, model):
    collator = default_collate if task.collator is None else task.collator(model)
    rows = task.rows()[:4]
    return dict(collator([{key: torch.as_tensor(value) for key, value in row.items()} for row in rows]))


@pytest.mark.parametrize("name", EXPECTED)
def test_the_task_follows_from_the_model_and_the_labels(name):
    task = TASKS[name]
    model = task.student_model().eval()
    collator = task.collator and task.collator(model)
    batch = collator(task.rows()[:4]) if collator else batch_of(task, model)
    assert find_labeling(model, batch) == EXPECTED[name]


@pytest.mark.parametrize("name", ["ctc", "captioning", "sentence-encoder", "object-detection", "time-series"])
def test_tasks_without_a_decision_for_each_label_are_refused(name):
    task = TASKS[name]
    model = task.student_model().eval()
    collator = task.collator and task.collator(model)
    batch = collator(task.rows()[:4]) if collator else batch_of(task, model)
    with pytest.raises(InputError, match=r"(?s)(has no labels|do not correspond).*what to do"):
        find_labeling(model, batch)


def collected(logits, labels, labeling):
    """Return the decisions about two batches, the second of one sample."""
    batches = [{"labels": labels[:-1]}, {"labels": labels[-1:]}]
    parts = iter([logits[:-1], logits[-1:]])
    return collect_decisions(lambda batch: next(parts), batches, labeling)


def test_tokens_that_are_ignored_count_for_nothing_and_the_next_one_is_predicted():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[0, :3] = -100
    for shifted in (False, True):
        found = collected(logits, labels, Labeling("words", shifted))
        expected = [
            (row, int(logits[row, n].argmax()), int(labels[row, n + shifted]), logits[row, n].softmax(-1).max())
            for row in range(3)
            for n in range(5 - shifted)
            if labels[row, n + shifted] != -100
        ]
        assert [*zip(found.samples, found.predicted, found.labels, strict=True)] == [entry[:3] for entry in expected]
        assert found.confidence == pytest.approx([float(entry[3]) for entry in expected])
        kept = labels[:, 1:] if shifted else labels
        scores = logits[:, :-1] if shifted else logits
        oracle = torch.nn.functional.cross_entropy(scores.reshape(-1, 7), kept.reshape(-1))
        assert found.surprise.mean() == pytest.approx(float(oracle))
        assert found.count == 3


def test_pixels_are_compared_at_the_size_of_the_labels():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 8, 8))
    labels[1, 0, 0] = 255
    found = collected(logits, labels, Labeling("classes", ignored=255))
    large = torch.nn.functional.interpolate(logits, size=(8, 8), mode="bilinear").argmax(1)
    keep = labels.flatten() != 255
    assert found.predicted.tolist() == large.flatten()[keep].tolist() and len(found.labels) == 127


def test_classes_that_join_numbers_and_spans():
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3), torch.randint(0, 2, (4, 3)).float()
    found = collected(logits, labels, Labeling("multi_label"))
    assert found.predicted.tolist() == (logits > 0).flatten().tolist() and found.samples.tolist() == [
        n // 3 for n in range(12)
    ]
    numbers = collected(torch.randn(4, 1), torch.randn(4), Labeling("regression"))
    assert numbers.confidence is None and len(numbers.predicted) == 4
    ends = torch.randn(4, 6, 2)
    spans = collect_decisions(
        lambda batch: ends,
        [{"start_positions": torch.tensor([0, 1, 2, 3]), "end_positions": torch.tensor([1, 2, 3, 9])}],
        Labeling("spans"),
    )
    assert spans.predicted.reshape(4, 2).tolist() == [
        [int(ends[n, :, 0].argmax()), int(ends[n, :, 1].argmax())] for n in range(4)
    ]
    assert logits_of(ends, "model") is ends
