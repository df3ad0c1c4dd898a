"""Probabilistic knowledge transfer against loops over its equations."""

import copy
import math

import numpy as np
import pytest
import torch

from hf_semckd.errors import InputError
from hf_semckd.features import FeatureSpec
from hf_semckd.losses.pkt import ProbabilisticTransferLoss

MASK = (torch.arange(6) < torch.tensor([[3], [6], [1], [5], [2], [4], [6], [2]])).long()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image_tokens(channels, side):
    return FeatureSpec("image tokens", "tokens", channels, 1 + side * side, (side, side), 1)


SCENARIOS = {
    "maps": ([(4, 3, 3), (5, 2, 3)], [(6, 4, 4), (7, 3, 3)]),
    "image tokens": ([image_tokens(4, 2), image_tokens(5, 2)], [image_tokens(6, 3), image_tokens(7, 3)]),
    "text": ([(6, 4), (6, 5)], [(6, 6), (6, 7)]),
}


def shape_of(spec):
    return (spec.length, spec.channels) if isinstance(spec, FeatureSpec) else spec


def problem(scenario, batch=8, **options):
    """Return a loss, features of both models, and the masks of both (text only)."""
    torch.manual_seed(0)
    students, teachers = SCENARIOS[scenario]
    loss = ProbabilisticTransferLoss(students, teachers, **options).double()
    student = [normal(batch, *shape_of(spec), seed=s) for s, spec in enumerate(students)]
    teacher = [normal(batch, *shape_of(spec), seed=50 + t) for t, spec in enumerate(teachers)]
    masks = (MASK[:batch], MASK[:batch]) if scenario == "text" else (None, None)
    return loss, student, teacher, masks


def vectors(features, scenario):
    """Return what stands for each sample in the last layer, one sum at a time."""
    rows = []
    for i, sample in enumerate(features[-1].tolist()):
        if scenario == "image tokens":
            rows.append(np.array(sample[0]))
        elif scenario == "maps":
            rows.append(np.array([np.mean(channel) for channel in sample]))
        else:
            rows.append(np.mean([token for token, kept in zip(sample, MASK[i], strict=True) if kept], 0))
    return rows


def probabilities(rows):
    """Return p[i][j], the shifted cosine over the sum of its row."""
    table = []
    for x in rows:
        kernel = [(x @ y / math.sqrt((x @ x) * (y @ y)) + 1) / 2 for y in rows]
        table.append([entry / sum(kernel) for entry in kernel])
    return table


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_loss_is_that_of_the_equations(scenario):
    loss, student, teacher, masks = problem(scenario)
    own, theirs = probabilities(vectors(student, scenario)), probabilities(vectors(teacher, scenario))
    expected = [
        sum(t * math.log((t + 1e-7) / (s + 1e-7)) for s, t in zip(own[i], theirs[i], strict=True)) / 8
        for i in range(8)
    ]
    out = loss(student, teacher, *masks)
    np.testing.assert_allclose(out.per_sample, expected, rtol=1e-9)
    assert float(out.total) == pytest.approx(sum(expected) / 8, rel=1e-10) and out.total > 1e-5


def test_a_student_that_differs_by_a_rotation_and_by_lengths_has_no_loss():
    _, _, teacher, masks = problem("text")
    same = ProbabilisticTransferLoss([(6, 7)], [(6, 7)])
    rotation = torch.linalg.qr(normal(7, 7))[0]
    assert same([3 * teacher[1] @ rotation], teacher[1:], *masks).total.abs() < 1e-12


def gradients(loss, student, teacher, masks):
    student = [feature.clone().requires_grad_() for feature in student]
    out = loss(student, teacher, *masks)
    out.total.backward()
    return out, student[-1].grad, [parameter.grad for parameter in loss.parameters()]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_gradients_reach_the_student_and_the_parameters_but_not_the_teacher(scenario):
    loss, student, teacher, masks = problem(scenario)
    teacher = [feature.requires_grad_() for feature in teacher]
    _, gradient, parameters = gradients(loss, student, teacher, masks)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    assert len(parameters) == 0
    assert all(entry.isfinite().all() and entry.abs().max() > 0 for entry in parameters)
    assert all(feature.grad is None for feature in teacher)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_gradient_of_features_agrees_with_finite_differences(scenario):
    loss, student, teacher, masks = problem(scenario)
    loss.eval()
    _, gradient, _ = gradients(loss, student, teacher, masks)
    direction, step = normal(*student[-1].shape, seed=9), 1e-6
    ahead = loss([student[0], student[-1] + step * direction], teacher, *masks).total
    behind = loss([student[0], student[-1] - step * direction], teacher, *masks).total
    slope = (ahead - behind).detach() / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-5)


@pytest.mark.parametrize("filling", [float("nan"), float("inf"), 1e30])
def test_padding_never_enters(filling):
    (loss, student, teacher, masks), (other, clean, clean_teacher, _) = problem("text"), problem("text")
    for feature in (*student, *teacher):
        feature[MASK == 0] = filling
    out, gradient, parameters = gradients(loss, student, teacher, masks)
    expected, expected_gradient, expected_parameters = gradients(other, clean, clean_teacher, masks)
    assert torch.equal(out.per_sample, expected.per_sample)
    assert torch.equal(gradient, expected_gradient) and gradient[MASK == 0].abs().max() == 0
    for left, right in zip(parameters, expected_parameters, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_permutation_of_the_batch_permutes_the_losses(scenario):
    loss, student, teacher, masks = problem(scenario)
    order, other = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4]), copy.deepcopy(loss)
    out, gradient, _ = gradients(loss, student, teacher, masks)
    moved_masks = [mask if mask is None else mask[order] for mask in masks]
    parts = [feature[order] for feature in student], [feature[order] for feature in teacher]
    moved, moved_gradient, _ = gradients(other, *parts, moved_masks)
    assert out.per_sample.std() > 0
    torch.testing.assert_close(moved.per_sample, out.per_sample[order], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(moved_gradient, gradient[order], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_batch_of_one_has_a_finite_loss_and_finite_gradients(scenario):
    loss, student, teacher, masks = problem(scenario, batch=1)
    out, gradient, parameters = gradients(loss, student, teacher, masks)
    assert out.per_sample.shape == (1,) and out.total.isfinite()
    assert all(entry.isfinite().all() for entry in (gradient, *parameters))


def test_identical_samples_and_empty_ones_have_finite_gradients():
    loss, student, teacher, _ = problem("text")
    for feature in (*student, *teacher):
        feature[2:5] = feature[1]
    mask = MASK.clone()
    mask[1:5], mask[6:] = 1, 0
    out, gradient, parameters = gradients(loss, student, teacher, (mask, mask))
    assert out.total.isfinite() and all(entry.isfinite().all() for entry in (gradient, *parameters))
    assert gradient[6:].abs().max() == 0
    same = [feature[:1].expand(8, -1, -1).contiguous() for feature in student]
    out, gradient, parameters = gradients(loss, same, teacher, (None, None))
    assert out.total.isfinite() and all(entry.isfinite().all() for entry in (gradient, *parameters))


def test_only_the_last_layers_are_kept_and_compared():
    loss, student, teacher, masks = problem("text")
    loss.eval()
    kept = loss.select(teacher, masks[1])
    assert set(kept) == {"whole.1", "mask"}
    out = loss(student, kept, masks[0])
    again = loss([student[0] + 1, student[1]], [teacher[0] - 1, teacher[1]], *masks)
    assert torch.equal(out.per_sample, again.per_sample)


def test_half_precision_features_are_compared_in_float32():
    loss, student, teacher, masks = problem("text")
    loss.float().eval()
    small = [[feature.bfloat16() for feature in features] for features in (student, teacher)]
    wide = [[feature.float() for feature in features] for features in small]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = loss(*small, *masks)
    assert out.per_sample.dtype == torch.float32
    torch.testing.assert_close(out.per_sample, loss(*wide, *masks).per_sample, rtol=1e-4, atol=1e-7)


def test_another_number_of_features_is_refused():
    loss, student, teacher, masks = problem("text")
    with pytest.raises(InputError, match="1 student and 2 teacher features"):
        loss(student[:1], teacher, *masks)
    with pytest.raises(InputError, match="2 student and 1 teacher features"):
        loss(student, teacher[:1], *masks)


def test_the_weight_is_the_published_one():
    assert ProbabilisticTransferLoss.default_weight == 30000.0
