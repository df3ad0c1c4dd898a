"""The quality that is logged, against loops over decisions."""

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_semckd.recipes.classes import Classes
from hf_semckd.recipes.scores import training_metrics
from hf_semckd.recipes.tasks.answers import QuestionAnswering
from hf_semckd.recipes.tasks.generation import TextGeneration
from hf_semckd.recipes.tasks.text import TextClassification, TokenClassification

NAMES = ("a", "b", "c")


def score(task, classes, logits, labels):
    """Decide as Trainer lets it decide, and score the decisions."""
    found = training_metrics(task, classes)
    decided = found["preprocess_logits_for_metrics"](logits, labels)
    plain = tuple(map(np.asarray, labels)) if isinstance(labels, tuple) else np.asarray(labels)
    return found["compute_metrics"](EvalPrediction(np.asarray(decided), plain))


@pytest.mark.parametrize("packed", [False, True], ids=["logits", "a tuple with more"])
def test_accuracy_counts_what_has_a_label(packed):
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 7, 3), torch.randint(3, (5, 7))
    labels[:, 3:5] = -100
    right = total = 0
    for row in range(5):
        for place in range(7):
            if labels[row, place] != -100:
                total += 1
                right += int(max(range(3), key=lambda c: logits[row, place, c]) == labels[row, place])
    classes = Classes(NAMES, "single", NAMES)
    given = (logits, None) if packed else logits
    assert score(TokenClassification, classes, given, labels) == {"accuracy": pytest.approx(right / total)}


def test_several_classes_are_decided_one_by_one():
    logits = torch.tensor([[1.0, -1.0, 2.0], [-1.0, -1.0, 1.0]])
    labels = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    assert score(TextClassification, Classes(NAMES, "multi", NAMES), logits, labels) == {
        "accuracy": pytest.approx(5 / 6)
    }


def test_numbers_are_correlated():
    logits, labels = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2.0, 1.0, 5.0])
    x, y = [1, 2, 4], [2, 1, 5]
    mx, my = sum(x) / 3, sum(y) / 3
    over = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    under = (sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y)) ** 0.5
    found = score(TextClassification, Classes((), "regression"), logits, labels)
    assert found == {"pearson": pytest.approx(over / under)}


def test_spans_are_right_when_both_ends_are():
    start = torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    end = torch.tensor([[0.0, 0.0, 9.0], [9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
    labels = (torch.tensor([1, 0, 2]), torch.tensor([2, 2, 1]))
    assert score(QuestionAnswering, None, (start, end), labels) == {"exact_match": pytest.approx(2 / 3)}


def test_language_models_have_none():
    assert training_metrics(TextGeneration, None) == {}
