"""Budgets: blocks go first, then channels, then both; what is advised where nothing fits can be followed."""

import re

import pytest
import torch
from makers import bert, gpt2, vit
from matrix.cells import case
from torch import nn
from transformers import BatchEncoding

from hf_semckd import make_student
from hf_semckd.errors import ConfigurationError
from hf_semckd.models import budgets

WORDS = {"input_ids": torch.arange(2, 14).view(2, 6), "labels": torch.tensor([0, 1])}


def count(model):
    return sum(entry.numel() for entry in model.parameters())


def shape(student):
    return student.config.num_hidden_layers, student.config.hidden_size


def with_large_embeddings(layers=6):
    return bert(layers, 32, num_attention_heads=4, vocab_size=2000)


@pytest.mark.slow
def test_channels_go_where_a_third_of_the_blocks_is_too_much():
    teacher = with_large_embeddings()
    tried = {}
    for layers, width in ((2, 32), (2, 24), (2, 16), (2, 8), (1, 32), (1, 24), (1, 16), (1, 8)):
        tried[layers, width] = count(make_student(teacher, num_layers=layers, hidden_size=width, report=False))
    for share in (0.7, 0.5, 0.25, 0.19):
        student = make_student(teacher, parameters=share, report=False)
        limit = share * count(teacher)
        fitting = {size: number for size, number in tried.items() if number <= limit}
        above = {size: number for size, number in fitting.items() if size[0] == 2}
        expected = max(above or fitting, key=lambda size: fitting[size])
        assert shape(student) == expected and count(student) == fitting[expected]


def test_what_is_given_stays():
    teacher = with_large_embeddings()
    assert shape(make_student(teacher, num_layers=5, parameters=0.6, report=False))[0] == 5
    assert shape(make_student(teacher, hidden_size=24, parameters=0.7, report=False))[1] == 24
    assert shape(make_student(teacher, report=False)) == shape(teacher)


def advised(error, name):
    return float(re.search(rf"set {name}=([0-9.e+-]+)", str(error.value)).group(1))


@pytest.mark.parametrize("fixed", [{}, {"num_layers": 4}, {"hidden_size": 24}])
def test_the_advice_for_parameters_can_be_followed(fixed):
    teacher = with_large_embeddings()
    with pytest.raises(ConfigurationError, match=r"is as small.*") as error:
        make_student(teacher, parameters=0.001, report=False, **fixed)
    share = advised(error, "parameters")
    student = make_student(teacher, parameters=share, report=False, **fixed)
    assert count(student) <= share * count(teacher)


def test_the_advice_for_a_latency_can_be_followed(monkeypatch):
    monkeypatch.setattr(budgets, "measure_latency", lambda model, batch: count(model) / 1000)
    teacher = bert(4, 32)
    with pytest.raises(ConfigurationError, match="as fast on this machine") as error:
        make_student(teacher, latency_ms=1e-6, batch=WORDS, report=False)
    make_student(teacher, latency_ms=advised(error, "latency_ms"), batch=WORDS, report=False)


@pytest.mark.slow
def test_a_latency_takes_blocks_then_channels_then_both(monkeypatch):
    """A clock that counts parameters: 1 ms for each thousand."""
    monkeypatch.setattr(budgets, "measure_latency", lambda model, batch: count(model) / 1000)
    teacher = with_large_embeddings()
    for share in (0.95, 0.6, 0.22):
        by_time = make_student(teacher, latency_ms=share * count(teacher) / 1000, batch=WORDS, report=False)
        assert shape(by_time) == shape(make_student(teacher, parameters=share, report=False))


def test_a_family_that_cannot_be_narrowed_loses_blocks_alone():
    teacher, inputs = case("bloom")
    one = make_student(teacher, num_layers=1, report=False)
    student = make_student(teacher, parameters=count(one) / count(teacher) + 1e-6, batch=inputs, report=False)
    assert student.config.n_layer == 1 and student.config.hidden_size == teacher.config.hidden_size
    with pytest.raises(ConfigurationError, match="is as small"):
        make_student(teacher, parameters=0.1, batch=inputs, report=False)


@pytest.mark.parametrize("share", [0, -0.5, 1.5])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigurationError, match=r"(?s)between 0 and 1.*what to do"):
        make_student(bert(2), parameters=share, report=False)


@pytest.mark.parametrize("latency", [0, -1, float("nan")])
def test_a_time_that_is_none_is_refused(latency):
    with pytest.raises(ConfigurationError, match=r"(?s)latency is a time.*what to do"):
        make_student(bert(2), latency_ms=latency, batch=WORDS, report=False)


def test_labels_are_no_part_of_what_is_timed():
    seen = []
    model = bert(2)
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    budgets.measure_latency(model, BatchEncoding(WORDS))
    handle.remove()
    assert seen and all(names == {"input_ids"} for names in seen)


def test_the_table_says_which_budget_was_met(capsys):
    make_student(vit(4), parameters=0.6)
    assert re.search(r"budget +parameters=0.6", capsys.readouterr().out)
    make_student(bert(2), latency_ms=1e6, batch=WORDS)
    assert re.search(r"budget +met without a cut", capsys.readouterr().out)


def test_both_budgets_are_kept(monkeypatch):
    monkeypatch.setattr(budgets, "measure_latency", lambda model, batch: float(model.config.num_hidden_layers))
    student = make_student(bert(6), parameters=0.9, latency_ms=3, batch=WORDS, report=False)
    assert student.config.num_hidden_layers == 3
    student = make_student(bert(6), parameters=0.5, latency_ms=6, batch=WORDS, report=False)
    assert student.config.num_hidden_layers <= 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_generation_settings_and_tied_weights_stay(dtype, tmp_path):
    teacher = gpt2(4, 32).to(dtype)
    teacher.generation_config.max_new_tokens = 7
    student = make_student(teacher, num_layers=2, hidden_size=16, report=False)
    assert student.dtype is dtype and student.generation_config.max_new_tokens == 7
    assert student.generation_config is not teacher.generation_config
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path)
    for model in (student, loaded):
        assert model.lm_head.weight is model.transformer.wte.weight
    assert loaded.generation_config.max_new_tokens == 7 and isinstance(loaded.lm_head, nn.Linear)


def test_numbers_of_a_batch_get_the_precision_of_the_teacher():
    teacher, batch = vit(4, 32).bfloat16(), {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    student = make_student(teacher, hidden_size=16, latency_ms=1e6, importance="loss", batch=batch, report=False)
    assert student.dtype is torch.bfloat16 and batch["pixel_values"].dtype is torch.float32


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["aria_text", "bart", "convbert", "deit", "gpt_oss", "mamba", "resnet", "swin", "t5"]
)
def test_the_advice_can_be_followed_for_any_family(family):
    teacher, inputs = case(family)
    with pytest.raises(ConfigurationError, match="is as small") as error:
        make_student(teacher, parameters=1e-4, batch=inputs, report=False)
    share = advised(error, "parameters")
    assert count(make_student(teacher, parameters=share, batch=inputs, report=False)) <= share * count(teacher)
