"""Patient knowledge distillation against loops over its equation."""

import copy
import math

import numpy as np
import pytest
import torch
from kept import named
from torch import nn

from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.features.layers import FeatureSpec
from hf_semckd.losses.pkd import PKDLoss

MASK = (torch.arange(6) < torch.tensor([[3], [6], [1], [5], [2], [4], [6], [2]])).long()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image_tokens(channels, side, prefix=1):
    return FeatureSpec("image tokens", "tokens", channels, prefix + side * side, (side, side), prefix)


# Student layers, teacher layers, and the teacher layer of each student layer but the last.
SCENARIOS = {
    "text": ([(6, 4), (6, 5), (6, 4)], [(6, width) for width in (7, 5, 7, 5, 5, 7)], [1, 3]),
    "text, fewer teacher layers": ([(6, 4)] * 4, [(6, 7)] * 3, [0, 1, 2]),
    "other tokenization": ([(6, 4)] * 2, [(9, 4)] * 4, [1]),
    "image tokens": ([image_tokens(4, 2)] * 3, [image_tokens(7, 3)] * 3, [0, 1]),
}


def shape_of(spec):
    return (spec.length, spec.channels) if isinstance(spec, FeatureSpec) else spec


def problem(scenario, batch=8):
    """Return a loss, features of both models, and the masks of both (text of one tokenization only)."""
    torch.manual_seed(0)
    students, teachers, _ = SCENARIOS[scenario]
    loss = PKDLoss(students, teachers, tokens_aligned=scenario != "other tokenization").double()
    student = [normal(batch, *shape_of(spec), seed=s) for s, spec in enumerate(students)]
    teacher = [normal(batch, *shape_of(spec), seed=50 + t) for t, spec in enumerate(teachers)]
    masks = (MASK[:batch], MASK[:batch]) if scenario.startswith("text") else (None, None)
    return loss, student, teacher, masks


def gradients(loss, student, teacher, masks):
    student = [feature.clone().requires_grad_() for feature in student]
    out = loss(student, teacher, *masks)
    out.total.backward()
    return out, [feature.grad for feature in student], [parameter.grad for parameter in loss.parameters()]


def unit(values):
    return values / math.sqrt(sum(value * value for value in values))


def errors(loss, scenario, student, teacher, first=0):
    """Return the error of each sample, one pair of layers at a time."""
    pairs = SCENARIOS[scenario][2]
    found = []
    for i in range(len(student[0])):
        parts = []
        for s, t in enumerate(pairs):
            token, target = student[s][i, first].numpy(), teacher[t][i, first].numpy()
            if len(token) != len(target):
                layer = loss.projection[s]
                token = layer.weight.detach().numpy() @ token + layer.bias.detach().numpy()
            parts.append(np.mean([(a - b) ** 2 for a, b in zip(unit(token), unit(target), strict=True)]))
        found.append(sum(parts) / len(pairs))
    return found


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_loss_is_that_of_the_published_code(scenario):
    loss, student, teacher, masks = problem(scenario)
    out, expected = loss(student, teacher, *masks), errors(loss, scenario, student, teacher)
    np.testing.assert_allclose(out.per_sample.detach(), expected, rtol=1e-10)
    assert float(out.total.detach()) == pytest.approx(sum(expected) / 8, rel=1e-10)
    assert loss.pairs == list(enumerate(SCENARIOS[scenario][2]))


def test_twelve_layers_teach_six_as_in_the_paper():
    loss = PKDLoss([(6, 4)] * 6, [(6, 4)] * 12)
    # Counted from one, the layers 2, 4, 6, 8 and 10.
    assert [t + 1 for _, t in loss.pairs] == [2, 4, 6, 8, 10]
    assert set(named(loss.select([normal(2, 6, 4)] * 12))) == {f"whole.{t}" for t in (1, 3, 5, 7, 9)}


def test_layers_of_equal_widths_are_not_projected():
    loss, _, _, _ = problem("text")
    assert isinstance(loss.projection[0], nn.Linear) and loss.projection[0].weight.shape == (5, 4)
    assert isinstance(loss.projection[1], nn.Identity)
    assert not list(PKDLoss([(6, 4)] * 3, [(6, 4)] * 3).parameters())


def test_lengths_of_tokens_make_no_difference():
    loss, student, teacher, masks = problem("other tokenization")
    longer = [3 * feature for feature in student], [5 * feature for feature in teacher]
    torch.testing.assert_close(loss(*longer, *masks).total, loss(student, teacher, *masks).total)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_gradients_reach_first_tokens_below_the_last_layer_and_parameters_but_not_the_teacher(scenario):
    loss, student, teacher, masks = problem(scenario)
    teacher = [feature.requires_grad_() for feature in teacher]
    _, features, parameters = gradients(loss, student, teacher, masks)
    for feature in features[:-1]:
        assert feature[:, 0].abs().max() > 0 and feature[:, 1:].abs().max() == 0
    assert features[-1] is None and all(entry.abs().max() > 0 for entry in parameters)
    assert all(feature.grad is None for feature in teacher)


@pytest.mark.parametrize("filling", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_enters(side, filling):
    loss, student, teacher, _ = problem("text")
    mask = MASK if side == "right" else MASK.flip(1)
    expected = [
        errors(loss, "text", [f[i : i + 1] for f in student], [f[i : i + 1] for f in teacher], first)[0]
        for i, first in enumerate(mask.argmax(1).tolist())
    ]
    for feature in (*student, *teacher):
        feature[mask == 0] = filling
    out, features, parameters = gradients(loss, student, teacher, (mask, mask))
    np.testing.assert_allclose(out.per_sample.detach(), expected, rtol=1e-10)
    assert all(feature[mask == 0].abs().max() == 0 and feature.isfinite().all() for feature in features[:-1])
    assert all(entry.isfinite().all() for entry in parameters)


def test_a_sample_without_any_token_has_no_loss_and_disturbs_nobody():
    loss, student, teacher, masks = problem("text")
    whole = loss(student, teacher, *masks).per_sample
    mask = MASK.clone()
    mask[4] = 0
    for feature in (*student, *teacher):
        feature[4] = float("nan")
    out, features, parameters = gradients(loss, student, teacher, (mask, mask))
    others = [i for i in range(8) if i != 4]
    assert out.per_sample[4] == 0 and torch.equal(out.per_sample[others], whole[others])
    assert all(entry.isfinite().all() for entry in (*features[:-1], *parameters))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_permutation_of_the_batch_permutes_the_losses(scenario):
    loss, student, teacher, masks = problem(scenario)
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    parts = [feature[order] for feature in student], [feature[order] for feature in teacher]
    moved = loss(*parts, *[mask if mask is None else mask[order] for mask in masks])
    out = loss(student, teacher, *masks)
    assert out.per_sample.std() > 0
    torch.testing.assert_close(moved.per_sample, out.per_sample[order], rtol=1e-12, atol=0)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_batch_of_one_has_the_loss_that_it_has_among_others(scenario):
    loss, student, teacher, masks = problem(scenario)
    one, one_student, one_teacher, one_masks = problem(scenario, batch=1)
    one_student, one_teacher = [f[:1] for f in student], [f[:1] for f in teacher]
    out, features, _ = gradients(one, one_student, one_teacher, one_masks)
    torch.testing.assert_close(out.per_sample, loss(student, teacher, *masks).per_sample[:1])
    assert all(feature.isfinite().all() for feature in features[:-1])


def test_zero_tokens_have_finite_gradients():
    loss, student, teacher, masks = problem("other tokenization")
    zeros = [torch.zeros_like(feature) for feature in student]
    out, features, _ = gradients(loss, zeros, teacher, masks)
    assert out.total.isfinite() and features[0].isfinite().all()


def test_half_precision_features_are_compared_in_float32():
    loss, student, teacher, masks = problem("text")
    loss, small = loss.float(), [[feature.bfloat16() for feature in features] for features in (student, teacher)]
    wide = [[feature.float() for feature in features] for features in small]
    out = copy.deepcopy(loss)(*small, *masks)
    assert out.per_sample.dtype == torch.float32
    torch.testing.assert_close(out.per_sample, loss(*wide, *masks).per_sample, rtol=1e-5, atol=1e-7)


def test_selected_features_give_what_the_features_give():
    loss, student, teacher, masks = problem("text")
    kept = loss.select(teacher, masks[1])
    assert torch.equal(loss(student, kept, masks[0]).per_sample, loss(student, teacher, *masks).per_sample)


@pytest.mark.parametrize(
    ("students", "teachers", "text"),
    [
        ([(4, 6, 6), (6, 4)], [(6, 4)] * 2, "a map at student layer `student 0`.*student_layers"),
        ([(6, 4)] * 2, [(4, 6, 6), (6, 4)], "a map at teacher layer `teacher 0`.*teacher_layers"),
        ([image_tokens(4, 2, 0)] * 2, [(6, 4)] * 2, "image patches without a token in front"),
        ([(6, 4)], [(6, 4)] * 2, "one student layer.*at least two"),
    ],
)
def test_layers_without_a_first_token_and_single_layers_are_refused(students, teachers, text):
    with pytest.raises(ConfigurationError, match=f"(?s){text}"):
        PKDLoss(students, teachers)


@pytest.mark.parametrize(("students", "teachers"), [([], [(6, 4)]), ([(6, 4)] * 2, [])])
def test_no_layer_at_all_is_refused(students, teachers):
    with pytest.raises(InputError, match="There is no (student|teacher) layer"):
        PKDLoss(students, teachers)


def test_another_number_of_features_is_refused():
    loss, student, teacher, masks = problem("text")
    with pytest.raises(InputError, match="2 student and 6 teacher features"):
        loss(student[:2], teacher, *masks)
    with pytest.raises(InputError, match="3 student and 5 teacher features"):
        loss(student, teacher[:5], *masks)


def test_the_weight_is_the_published_one():
    assert PKDLoss.default_weight == 100.0
