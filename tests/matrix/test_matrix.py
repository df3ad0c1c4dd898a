"""Every family with every head: the layers are those that a person would name, and distillation trains them.

A few run by default, all by `make test-matrix`, which also writes docs/support.md.
"""

from typing import Any

import pytest

from matrix.cells import (
    MIXES_PADDING,
    cells,
    check_feature_gradient,
    check_layers,
    check_padding,
    check_pair,
    check_resume,
    check_training,
    is_text,
)
from matrix.families import FAMILIES

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
QUICK_RESUMES = {
    ("SEQUENCE_CLASSIFICATION", "albert"),
    ("CAUSAL_LM", "mamba"),
    ("SEQ_TO_SEQ_CAUSAL_LM", "bart"),
}
VISION = sorted(FAMILIES["IMAGE_CLASSIFICATION"])
# Tokenized alike here; all classify sequences.
TEXT = ["albert", "bart", "bert", "canine", "deberta-v2", "distilbert", "electra", "fnet", "funnel", "gpt2", "llama"]
TEXT += ["modernbert", "mpnet", "roberta", "xlnet"]
AUDIO = ["data2vec-audio", "hubert", "sew", "unispeech", "wav2vec2", "wavlm"]
QUICK_PAIRS = {("resnet", "swin"), ("vit", "hiera"), ("pvt", "deit")}
QUICK_PAIRS |= {("distilbert", "llama"), ("gpt2", "funnel"), ("hubert", "wavlm"), ("sew", "wav2vec2")}


def pairs(families: list[str]) -> list[tuple[str, str]]:
    """Return every family as the student of every other."""
    return [(student, teacher) for student in families for teacher in families if student != teacher]


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


@pytest.mark.parametrize(("task", "family"), marked(cells(), QUICK_RESUMES))
def test_training_resumes(task, family, tmp_path):
    check_resume(task, family, tmp_path)


@pytest.mark.parametrize(("student", "teacher"), marked(pairs(VISION), QUICK_PAIRS))
def test_any_vision_family_teaches_any_other(student, teacher, tmp_path):
    check_pair("IMAGE_CLASSIFICATION", student, teacher, tmp_path)


@pytest.mark.parametrize(("student", "teacher"), marked(pairs(TEXT), QUICK_PAIRS))
def test_any_text_family_teaches_any_other(student, teacher, tmp_path):
    check_pair("SEQUENCE_CLASSIFICATION", student, teacher, tmp_path)


@pytest.mark.parametrize(("student", "teacher"), marked(pairs(AUDIO), QUICK_PAIRS))
def test_any_audio_family_teaches_any_other(student, teacher, tmp_path):
    check_pair("AUDIO_CLASSIFICATION", student, teacher, tmp_path)
