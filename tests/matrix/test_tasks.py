"""Every task with a tiny student and teacher: it trains, loads, is reached by features, and resumes.

A few run by default, all by `make test-matrix`, which also writes docs/support.md.
"""

import pytest

from matrix.tasks import TASKS, check_feature_gradient, check_resume, check_training

QUICK = {
    "token-classification",
    "question-answering",
    "causal-lm-packed",
    "seq2seq",
    "segmentation",
    "ctc",
    "image-text-to-text",
    "plain-teacher",
}


def marks_of(name):
    """Return the marks of a task that belongs to the whole matrix."""
    return [] if name in QUICK else [pytest.mark.matrix, pytest.mark.slow]


NAMES = [pytest.param(name, marks=marks_of(name), id=name) for name in TASKS]


@pytest.mark.parametrize("task", NAMES)
def test_a_task_trains_and_its_student_loads(task, tmp_path):
    check_training(TASKS[task], tmp_path)


@pytest.mark.parametrize("task", NAMES)
def test_features_alone_reach_the_blocks_of_a_task(task, tmp_path):
    check_feature_gradient(TASKS[task], tmp_path)


@pytest.mark.parametrize("task", NAMES)
def test_a_task_resumes(task, tmp_path):
    check_resume(TASKS[task], tmp_path)
