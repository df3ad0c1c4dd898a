"""Losses on logits against scipy and the autograd of the plain form."""

import numpy as np
import pytest
import torch
from naive import normal
from scipy import special

from hf_semckd.losses.logits import binary_kd_loss, kd_loss, logit_loss_sum


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
