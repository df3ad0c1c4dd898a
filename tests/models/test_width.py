"""Narrowed students: of a model whose last channels, heads and units are silent, the first ones are kept."""

import pytest
import torch
from makers import bert, gpt2, vit
from matrix.cells import FIRST_TASK, case, outputs_of
from torch import nn

from hf_semckd import make_student
from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.models.width import narrow

NARROWED = [
    "bert",
    "distilbert",
    "roberta",
    "llama",
    "qwen2",
    "gpt2",
    "gpt_neox",
    "t5",
    "bart",
    "vit",
    "deit",
]
QUICK = {"bert", "llama", "gpt2", "t5", "vit"}
CASES = [
    pytest.param(family, id=family, marks=() if family in QUICK else (pytest.mark.matrix, pytest.mark.slow))
    for family in NARROWED
    if family in FIRST_TASK
]


@pytest.mark.parametrize("family", CASES)
def test_a_narrowed_student_is_an_ordinary_model_of_its_size(family, tmp_path):
    model, inputs = case(family)
    before = outputs_of(model, inputs)
    student = make_student(model, hidden_size=8, batch=inputs, report=False)
    sizes = [sum(entry.numel() for entry in each.parameters()) for each in (model, student)]
    assert sizes[1] < 0.7 * sizes[0] and torch.equal(outputs_of(model, inputs), before)
    student.save_pretrained(tmp_path)
    loaded, info = type(student).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    torch.testing.assert_close(outputs_of(loaded, inputs), outputs_of(student, inputs), rtol=1e-5, atol=1e-6)


def test_heads_channels_and_units_that_say_nothing_are_those_that_go():
    model = bert(2, 32, num_attention_heads=4, intermediate_size=64, initializer_range=0.5)
    with torch.no_grad():
        for name, entry in model.named_parameters():
            entry.add_(0.5 * torch.rand_like(entry))
            for axis, length in enumerate(entry.shape):
                # The last half of whatever is 32 (channels and heads) or 64 (inner units, and words).
                if length in (32, 64) and "word_embeddings" not in name:
                    entry.narrow(axis, length // 2, length // 2).zero_()
        model.bert.embeddings.word_embeddings.weight[:, 16:] = 0
    student = make_student(model, hidden_size=16, report=False)
    assert student.config.num_attention_heads == 2 and student.config.intermediate_size == 32
    own = student.state_dict()
    for name, entry in model.state_dict().items():
        assert torch.equal(own[name], entry[tuple(slice(0, n) for n in own[name].shape)]), name


@pytest.mark.parametrize("model", [bert, gpt2])
def test_an_impossible_width_says_what_is_possible(model):
    with pytest.raises(ConfigurationError, match=r"(?s)do not divide.*a multiple of 8"):
        narrow(model(2, 16), 12)


@pytest.mark.parametrize("family", ["bloom", "resnet", "swin"])
def test_families_whose_heads_or_channels_cannot_be_chosen_are_refused_by_name(family):
    """Each of BLOOM's heads has a slope of its own, and a hierarchical model a width for every stage."""
    model, inputs = case(family)
    with pytest.raises((InputError, ConfigurationError), match=f"(?s){type(model).__name__} cannot be narrowed"):
        make_student(model, hidden_size=8, batch=inputs, report=False)


def test_depth_and_width_go_together():
    teacher = vit(4, 32)
    student = make_student(teacher, num_layers=2, hidden_size=16, report=False)
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (2, 16)
    assert isinstance(student.classifier, nn.Linear) and student.classifier.in_features == 16
    whole = sum(entry.numel() for entry in teacher.parameters())
    small = make_student(teacher, hidden_size=16, parameters=0.2, report=False)
    assert sum(entry.numel() for entry in small.parameters()) <= 0.2 * whole
