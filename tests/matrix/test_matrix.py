"""Every family with every head: the layers are those that a person would name, and distillation trains them.

A few run by default, all by `make test-matrix`, which also writes docs/support.md.
"""

from typing import Any

import pytest

from hf_semckd import SemCKDTrainer
from matrix.cells import (
    MIXES_PADDING,
    cells,
    check_feature_gradient,
    check_layers,
    check_padding,
    check_training,
    is_text,
    rows,
)
from matrix.families import FAMILIES
from matrix.tiny_models import make

QUICK = {
    ("SEQUENCE_CLASSIFICATION", "albert"),
    ("SEQUENCE_CLASSIFICATION", "canine"),
    ("CAUSAL_LM", "llama"),
    ("CAUSAL_LM", "mamba"),
    ("SEQ_TO_SEQ_CAUSAL_LM", "bart"),
    ("IMAGE_CLASSIFICATION", "hiera"),
    ("IMAGE_CLASSIFICATION", "swin"),
    ("IMAGE_CLASSIFICATION", "swiftformer"),
    ("AUDIO_CLASSIFICATION", "wav2vec2"),
    ("CTC", "hubert"),
}
VISION = sorted(FAMILIES["IMAGE_CLASSIFICATION"])
PAIRS = [(student, teacher) for student in VISION for teacher in VISION if student != teacher]
QUICK_PAIRS = {("resnet", "swin"), ("vit", "hiera"), ("pvt", "deit")}


def marked(entries: list[Any], quick: set[Any]) -> list[Any]:
    """Return the entries as parameters; those that are not quick belong to the whole matrix."""
    marks = [() if entry in quick else (pytest.mark.matrix, pytest.mark.slow) for entry in entries]
    return [pytest.param(*e, marks=m, id="-".join(e)) for e, m in zip(entries, marks, strict=True)]


@pytest.mark.parametrize(("task", "family"), marked(cells(), QUICK))
def test_layers_are_those_that_a_person_would_name(task, family):
    check_layers(task, family)


@pytest.mark.parametrize(("task", "family"), marked(cells(), QUICK))
def test_all_terms_train_and_the_student_loads(task, family, tmp_path):
    check_training(task, family, tmp_path)


@pytest.mark.parametrize(("task", "family"), marked(cells(), QUICK))
def test_the_feature_term_reaches_the_blocks(task, family, tmp_path):
    check_feature_gradient(task, family, tmp_path)


@pytest.mark.parametrize(
    ("task", "family"), marked([cell for cell in cells() if is_text(cell[0]) and cell[1] not in MIXES_PADDING], QUICK)
)
def test_padding_changes_nothing(task, family, tmp_path):
    check_padding(task, family, tmp_path)


@pytest.mark.parametrize(("student", "teacher"), marked(PAIRS, QUICK_PAIRS))
def test_any_vision_family_teaches_any_other(student, teacher, tmp_path):
    from makers import config, losses

    own, other = make(student, "IMAGE_CLASSIFICATION"), make(teacher, "IMAGE_CLASSIFICATION", seed=1)
    data = rows("IMAGE_CLASSIFICATION", student, own)
    theirs = rows("IMAGE_CLASSIFICATION", teacher, other)
    if data[0]["pixel_values"].shape != theirs[0]["pixel_values"].shape:
        for row, one in zip(data.rows, theirs.rows, strict=True):
            row["teacher_pixel_values"] = one["pixel_values"]
    args = config(tmp_path, max_steps=1)
    trainer = SemCKDTrainer(model=own, teacher_model=other, args=args, train_dataset=data)
    trainer.train()
    assert losses(trainer, "feature_loss")[0] > 0
