"""Decisions about samples, tokens, pixels, spans and numbers, against loops by hand; which task a model has."""

import pytest
import torch
from matrix.tasks import TASKS
from torch.utils.data import default_collate

from hf_semckd.errors import InputError
from hf_semckd.evaluation.decisions import DecisionCollector, Labeling, find_labeling, labels_of

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
    collector = DecisionCollector(labeling, "student")
    collector.add(logits[:-1], labels[:-1])
    collector.add(logits[-1:], labels[-1:])
    return collector.decisions()


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
    ends, starts = torch.randn(4, 6, 2), torch.tensor([0, 1, 2, 3])
    labels = labels_of({"start_positions": starts, "end_positions": starts + 2})
    spans = collected(ends, labels.where(labels < 5, 9), Labeling("spans"))
    # The answer of the last sample was cut off.
    assert spans.samples.tolist() == [0, 0, 1, 1, 2, 2] and spans.count == 4
    assert spans.predicted.reshape(3, 2).tolist() == ends[:3].argmax(1).tolist()


@pytest.mark.parametrize(
    ("logits", "labels", "kind", "said"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), "classes", "the label 3, and 3 classes"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), "classes", "the label -1"),
        (torch.zeros(2, 3), torch.zeros(2, 1).long(), "classes", "do not correspond"),
        (torch.zeros(2, 5, 3), torch.zeros(2, 4).long(), "words", "do not correspond"),
        (torch.zeros(2, 3), torch.zeros(2), "regression", "do not correspond"),
        (torch.zeros(2, 3), torch.full((2, 3), 7.0), "multi_label", "the label 7"),
        (torch.full((2, 3), float("nan")), torch.tensor([0, 1]), "classes", "NaN or infinite logits"),
        (torch.zeros(2, 5, 3), torch.full((2, 5), -100), "words", "No label of the data set counts"),
    ],
)
def test_labels_that_do_not_fit_are_refused(logits, labels, kind, said):
    with pytest.raises(InputError, match=f"(?s){said}.*what to do"):
        collected(logits, labels, Labeling(kind))
