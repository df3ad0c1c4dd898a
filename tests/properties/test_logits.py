"""Losses on logits: finite for all finite logits, never negative, and zero for equal ones."""

import pytest
import torch
from drawn import DTYPES, values
from hypothesis import given
from hypothesis import strategies as st

from hf_semckd.errors import SemCKDError
from hf_semckd.losses.logits import LogitMatch, LogitMixture, binary_kd_loss, kd_loss, logit_loss_sum

TEMPERATURES = st.floats(0.05, 100)
TASKS = ("classes", "pixels", "regression", "multi_label", "tokens", "frames", "spans")
LIBRARY = {"classes": "single_label", "pixels": "single_label"}


@st.composite
def problems(draw, task, dtypes=DTYPES):
    """Draw the logits of both models, and the batch that says which of them count."""
    samples, length, classes = (draw(st.integers(1, 4)) for _ in range(3))
    shape = {
        "pixels": (samples, classes, length, 2),
        "tokens": (samples, length, classes),
        "frames": (samples, length, classes),
        "spans": (samples, length, 2),
    }.get(task, (samples, classes))
    student, teacher = (draw(values([shape], draw(st.sampled_from(dtypes))))[0] for _ in range(2))
    bits = draw(st.lists(st.booleans(), min_size=samples * length, max_size=samples * length))
    mask = torch.tensor(bits).view(samples, length).long()
    batch = {}
    if task in ("tokens", "spans") and draw(st.booleans()):
        batch["attention_mask"] = mask
    if task == "tokens" and draw(st.booleans()):
        batch["labels"] = torch.where(mask > 0, 0, -100)
    if task == "pixels" and draw(st.booleans()):
        batch["labels"] = torch.where(mask > 0, 0, 255).unsqueeze(2)
    frames = mask if task == "frames" and draw(st.booleans()) else None
    return student, teacher, batch, frames


def loss_of(task, problem, temperature, shifted=False):
    student, teacher, batch, frames = problem
    return logit_loss_sum(student, teacher, batch, temperature, LIBRARY.get(task, task), shifted, frames)


@pytest.mark.parametrize("task", TASKS)
@given(st.data(), TEMPERATURES)
def test_finite_logits_give_finite_losses_and_gradients(task, data, temperature):
    student, *others = data.draw(problems(task))
    student.requires_grad_()
    total = loss_of(task, (student, *others), temperature, shifted=task == "tokens" and data.draw(st.booleans()))
    assert total.isfinite() and total.dtype in (torch.float32, torch.float64)
    total.backward()
    assert not student.grad.isnan().any()
    assert student.grad.isfinite().all() or student.dtype == torch.float16  # its range may not hold them


@pytest.mark.parametrize("task", TASKS)
@given(st.data(), TEMPERATURES)
def test_equal_logits_cost_nothing_and_others_never_less(task, data, temperature):
    student, teacher, *others = data.draw(problems(task, (torch.float64,)))
    size = 1e-12 * (1 + float(student.abs().max() + teacher.abs().max())) ** 2 * student.numel() * temperature**2
    assert abs(float(loss_of(task, (teacher, teacher, *others), temperature))) <= size
    assert float(loss_of(task, (student, teacher, *others), temperature)) >= -size


@pytest.mark.parametrize("loss", [kd_loss, binary_kd_loss])
@given(st.data(), TEMPERATURES)
def test_samples_do_not_know_of_each_other(loss, data, temperature):
    student, teacher, *_ = data.draw(problems("classes", (torch.float64,)))
    alone = [loss(student[i : i + 1], teacher[i : i + 1], temperature) for i in range(len(student))]
    torch.testing.assert_close(torch.cat(alone), loss(student, teacher, temperature), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("task", TASKS)
@given(st.data(), TEMPERATURES)
def test_the_mixture_of_a_teacher_with_itself_teaches_the_same(task, data, temperature):
    student, teacher, batch, frames = data.draw(problems(task, (torch.float64,)))
    mix = LogitMixture([LogitMatch()] * 2, [0.25, 0.75], temperature, LIBRARY.get(task, task))
    mixture = mix([teacher] * 2, batch)
    assert mixture.isfinite().all()
    expected = loss_of(task, (student, teacher, batch, frames), temperature)
    size = 1e-10 * (1 + float(student.abs().max() + teacher.abs().max())) ** 2 * student.numel() * temperature**2
    assert float((loss_of(task, (student, mixture, batch, frames), temperature) - expected).abs()) <= size


@pytest.mark.parametrize("task", TASKS)
@given(st.data())
def test_logits_of_other_shapes_are_refused(task, data):
    student, teacher, batch, frames = data.draw(problems(task))
    wrong = data.draw(st.sampled_from([teacher[1:], teacher[..., 1:], teacher.unsqueeze(0), teacher.sum()]))
    with pytest.raises(SemCKDError):
        loss_of(task, (student, wrong, batch, frames), 1.0)
