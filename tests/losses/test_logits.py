"""Losses on logits against scipy and the autograd of the plain form."""

import numpy as np
import pytest
import torch
from naive import normal
from scipy import special

from hf_semckd.losses.logits import LogitMatch, LogitMixture, binary_kd_loss, kd_loss, logit_loss_sum


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kd_loss_is_temperature_squared_times_the_divergence(temperature):
    student, teacher = normal(3, 5, 7, seed=1) * 3, normal(3, 5, 7, seed=2) * 3
    p = special.softmax(teacher.numpy() / temperature, axis=-1)
    q = special.softmax(student.numpy() / temperature, axis=-1)
    expected = special.rel_entr(p, q).sum(-1) * temperature**2
    np.testing.assert_allclose(kd_loss(student, teacher, temperature), expected, rtol=1e-12)


def test_kd_loss_gradient_is_temperature_times_the_difference_of_probabilities():
    student, teacher = normal(4, 6, seed=3).requires_grad_(), normal(4, 6, seed=4).requires_grad_()
    kd_loss(student, teacher, 3.0).sum().backward()
    expected = 3.0 * (torch.softmax(student / 3, -1) - torch.softmax(teacher / 3, -1))
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-12, atol=1e-14)
    assert teacher.grad is None


def test_kd_loss_is_zero_for_equal_logits_up_to_a_shift_and_positive_else():
    logits = normal(4, 6, seed=5)
    assert kd_loss(logits + 7, logits, 2.0).abs().max() < 1e-13
    assert (kd_loss(normal(4, 6, seed=6), logits, 2.0) > 0).all()


@pytest.mark.parametrize("loss", [kd_loss, binary_kd_loss])
def test_logit_losses_stay_finite_on_extreme_logits(loss):
    student = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
    value = loss(student, torch.tensor([[-500.0, 500.0, 0.0]]), 1.0)
    value.sum().backward()
    assert value.isfinite().all() and student.grad.isfinite().all()


@pytest.mark.parametrize("loss", [kd_loss, binary_kd_loss])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logit_losses_compute_half_precision_logits_in_float32(loss, dtype):
    student, teacher = normal(4, 6, seed=7, dtype=dtype), normal(4, 6, seed=8, dtype=dtype)
    value = loss(student, teacher, 4.0)
    assert value.dtype == torch.float32
    np.testing.assert_allclose(value, loss(student.double(), teacher.double(), 4.0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_binary_kd_loss_is_the_mean_divergence_of_bernoullis(temperature):
    student, teacher = normal(3, 5, 4, seed=9) * 3, normal(3, 5, 4, seed=10) * 3
    p, q = special.expit(teacher.numpy() / temperature), special.expit(student.numpy() / temperature)
    divergence = special.rel_entr(p, q) + special.rel_entr(1 - p, 1 - q)
    expected = divergence.mean(-1) * temperature**2
    np.testing.assert_allclose(binary_kd_loss(student, teacher, temperature), expected, rtol=1e-11)


def test_binary_kd_loss_of_one_label_is_kd_loss_against_a_zero_logit():
    student, teacher = normal(8, 1, seed=11), normal(8, 1, seed=12)
    two_classes = kd_loss(torch.cat([student, 0 * student], 1), torch.cat([teacher, 0 * teacher], 1), 2.0)
    torch.testing.assert_close(binary_kd_loss(student, teacher, 2.0), two_classes, rtol=1e-12, atol=1e-14)


def test_binary_kd_loss_sends_no_gradient_to_the_teacher():
    student, teacher = normal(4, 3, seed=13).requires_grad_(), normal(4, 3, seed=14).requires_grad_()
    binary_kd_loss(student, teacher, 2.0).sum().backward()
    assert teacher.grad is None and student.grad is not None


def test_frames_are_averaged_over_each_sound_without_its_padding():
    """CTC: labels are not along the frames, and every frame of a sound counts."""
    student, teacher = (torch.randn(2, 5, 4, dtype=torch.float64) for _ in range(2))
    frames = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    student[1, 4] = torch.nan
    expected = 0.0
    for sample, length in enumerate((5, 3)):
        own, theirs = (logits[sample, :length].div(2).log_softmax(-1) for logits in (student, teacher))
        expected += float(4 * (theirs.exp() * (theirs - own)).sum(-1).mean())
    labels = {"labels": torch.tensor([[1, 2], [3, -100]])}
    assert float(logit_loss_sum(student, teacher, labels, 2.0, "frames", False, frames)) == pytest.approx(expected)


def test_masks_of_one_object_have_a_probability_for_every_pixel():
    student, teacher = (torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(2))
    own, theirs = ((logits / 2).sigmoid() for logits in (student, teacher))
    expected = theirs * (theirs / own).log() + (1 - theirs) * ((1 - theirs) / (1 - own)).log()
    actual = logit_loss_sum(student, teacher, {}, 2.0, "multi_label", False)
    assert float(actual) == pytest.approx(4 * float(expected.mean((1, 2)).sum()))


def mixed(task, logits, weights=(0.2, 0.8), temperature=3.0, **batch):
    """Return what teachers are joined to, as an array."""
    mixture = LogitMixture([LogitMatch()] * len(logits), weights, temperature, task)
    return mixture(logits, batch).numpy()


@pytest.mark.parametrize(
    ("task", "shape", "axis"),
    [
        ("single_label", (3, 5), 1),
        ("single_label", (3, 5, 2, 2), 1),
        ("tokens", (3, 4, 5), -1),
        ("frames", (2, 4, 5), -1),
    ],
)
def test_a_mixture_has_the_weighted_mean_of_the_probabilities(task, shape, axis):
    first, second = (normal(*shape, seed=seed) * 4 for seed in (11, 12))
    expected = 0.2 * special.softmax(first / 3, axis) + 0.8 * special.softmax(second / 3, axis)
    np.testing.assert_allclose(special.softmax(mixed(task, [first, second]) / 3, axis), expected, rtol=1e-12)


def test_a_mixture_of_independent_labels_has_the_mean_of_each():
    first, second = normal(3, 4, seed=13) * 4, normal(3, 4, seed=14) * 4
    expected = 0.2 * special.expit(first.numpy() / 3) + 0.8 * special.expit(second.numpy() / 3)
    np.testing.assert_allclose(special.expit(mixed("multi_label", [first, second]) / 3), expected, rtol=1e-12)


def test_a_mixture_of_a_regression_is_the_mean():
    first, second = normal(3, 1, seed=15), normal(3, 1, seed=16)
    np.testing.assert_allclose(mixed("regression", [first, second]), 0.2 * first + 0.8 * second, rtol=1e-12)


def test_a_mixture_of_spans_is_over_the_positions_without_padding():
    first, second = normal(2, 5, 2, seed=17), normal(2, 5, 2, seed=18)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    joined = mixed("spans", [first, second], attention_mask=mask)
    for sample, length in enumerate((3, 5)):
        rows = [special.softmax(logits[sample, :length] / 3, 0) for logits in (first, second)]
        found = special.softmax(joined[sample, :length] / 3, 0)
        np.testing.assert_allclose(found, 0.2 * rows[0] + 0.8 * rows[1], rtol=1e-12)


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_a_mixture_is_finite_on_extreme_logits_and_of_one_teacher_twice_that_teacher(task):
    logits = torch.tensor([[500.0, -500.0, 3.0]])
    joined = torch.from_numpy(mixed(task, [logits, -logits], temperature=1.0))
    assert joined.isfinite().all()
    twice = torch.from_numpy(mixed(task, [logits, logits], (0.5, 0.5)))
    divergence = kd_loss if task == "single_label" else binary_kd_loss
    assert divergence(twice, logits, 3.0).abs().max() < 1e-6


def test_a_mixture_puts_the_classes_of_each_teacher_into_the_students_order():
    first, second = normal(3, 4, seed=19), normal(3, 4, seed=20)
    matches = [LogitMatch(), LogitMatch(order=torch.tensor([2, 0, 1, 3]), dim=1)]
    found = LogitMixture(matches, (0.5, 0.5), 1.0, "single_label")([first, second], {})
    expected = (special.softmax(first, 1) + special.softmax(second, 1)[:, [2, 0, 1, 3]]) / 2
    np.testing.assert_allclose(special.softmax(found, 1), expected, rtol=1e-12)
