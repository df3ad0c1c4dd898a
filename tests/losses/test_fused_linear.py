"""Losses and gradients in chunks against the same written out with all logits, by autograd."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_semckd.losses.fused_linear import LanguageDistillation, LanguageLosses, TokenRows, fused_linear_losses
from hf_semckd.models.language_head import LanguageHead

ROWS, STUDENT, TEACHER, VOCABULARY = 7, 4, 5, 11
TASK, LOGIT = torch.tensor(0.3), torch.tensor(0.9)


def linear(width: int, size: int = VOCABULARY, *, bias: bool = False, seed: int = 0, **kind: Any) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(width, size, bias=bias, **{"dtype": torch.float64, **kind})


def rows(labeled: bool = True, dtype: torch.dtype = torch.float64) -> TokenRows:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (2 * torch.randn(ROWS, width, generator=generator).to(dtype) for width in (STUDENT, TEACHER))
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator).where(torch.arange(ROWS) != 2, -100)
    compared = (labels != -100).to(dtype)
    return TokenRows(student.requires_grad_(), teacher, labels if labeled else None, compared)


def distillation(*, bias: bool = False, scale: float = 1.0, cap: float | None = None, **changes: Any) -> Any:
    heads = LanguageHead(linear(STUDENT, bias=bias), scale, cap), LanguageHead(linear(TEACHER, seed=5), 0.5, 4.0)
    return LanguageDistillation(*heads, **{"temperature": 1.0, "chunk_size": 3, **changes})


def by_hand(rows: TokenRows, given: LanguageDistillation) -> tuple[Tensor, Tensor]:
    """Return the sums of cross-entropy and divergence, row by row, from probabilities of all tokens."""
    task = logit = torch.zeros((), dtype=torch.float64)
    for row in range(len(rows.compared)):
        logits = []
        for head, hidden in ((given.head, rows.student[row]), (given.teacher_head, rows.teacher[row])):
            outputs = head.linear.weight @ hidden
            outputs = outputs if head.linear.bias is None else outputs + head.linear.bias
            outputs = head.scale * outputs
            logits.append(outputs if head.soft_cap is None else head.soft_cap * torch.tanh(outputs / head.soft_cap))
        if rows.labels is not None and rows.labels[row] >= 0:
            task = task - logits[0].softmax(0)[rows.labels[row]].log()
        own, theirs = ((entry[: given.vocabulary] / given.temperature).softmax(0) for entry in logits)
        divergence = (theirs.detach() * (theirs.detach() / own).log()).sum()
        logit = logit + divergence * given.temperature**2 * rows.compared[row]
    return task, logit


def learned(rows: TokenRows, given: LanguageDistillation) -> list[Tensor]:
    """Return all that gets a gradient."""
    tensors = (rows.student, given.head.linear.weight, given.head.linear.bias)
    return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]


def total_of(rows: TokenRows, given: LanguageDistillation) -> LanguageLosses:
    return fused_linear_losses(rows, given, TASK, LOGIT)


CASES = {
    "plain": {},
    "temperature": {"temperature": 2.5},
    "bias and scale": {"bias": True, "scale": 0.25, "temperature": 2.0},
    "cap": {"cap": 1.5},
    "cap, scale and bias": {"cap": 1.5, "scale": 3.0, "bias": True, "temperature": 4.0},
    "vocabulary": {"vocabulary": 9},
    "vocabulary and temperature": {"vocabulary": 9, "temperature": 0.5, "cap": 2.0},
    "chunks of one": {"chunk_size": 1},
    "one chunk": {"chunk_size": 100, "temperature": 3.0},
    "chosen chunk": {"chunk_size": None},
}


@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_losses_and_gradients_are_those_of_all_logits(changes: dict[str, Any], labeled: bool) -> None:
    given, batch = distillation(**changes), rows(labeled)
    found, (task, logit) = total_of(batch, given), by_hand(batch, given)
    torch.testing.assert_close(found.task, task.detach())
    torch.testing.assert_close(found.logit, logit.detach())
    total = TASK.double() * task + LOGIT.double() * logit
    torch.testing.assert_close(found.total, total)
    leaves = learned(batch, given)
    torch.testing.assert_close(torch.autograd.grad(found.total, leaves), torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_gradients_are_those_of_finite_differences(changes: dict[str, Any]) -> None:
    given, batch = distillation(**changes), rows()

    leaves = learned(batch, given)

    class Total(torch.autograd.Function):
        """`gradcheck` runs backward again and again, each time for a forward of its own here."""

        @staticmethod
        def forward(ctx: Any, *_: Tensor) -> Tensor:
            return total_of(batch, given).total.detach()

        @staticmethod
        def backward(ctx: Any, outer: Tensor) -> Any:
            with torch.enable_grad():
                return torch.autograd.grad(total_of(batch, given).total, leaves, outer)

    assert torch.autograd.gradcheck(Total.apply, leaves)


def test_a_tied_head_adds_its_gradient_to_that_of_the_embedding() -> None:
    given, ids = distillation(), torch.arange(ROWS) % VOCABULARY
    weight = given.head.linear.weight

    def gradient(fused: bool) -> Tensor:
        batch = dataclasses.replace(rows(), student=weight[ids].tanh())
        task, logit = by_hand(batch, given)
        total = total_of(batch, given).total if fused else TASK.double() * task + LOGIT.double() * logit
        return torch.autograd.grad(total, weight)[0]

    torch.testing.assert_close(gradient(True), gradient(False))


def test_only_what_learns_gets_a_gradient() -> None:
    given, batch = distillation(bias=True), rows()
    given.head.linear.requires_grad_(False)
    total_of(batch, given).total.backward()
    assert batch.student.grad is not None and given.head.linear.weight.grad is None
    assert given.teacher_head.linear.weight.grad is None
    with torch.no_grad():
        assert not total_of(batch, given).total.requires_grad


def test_a_second_backward_is_refused_and_not_wrong() -> None:
    total = total_of(rows(), distillation()).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward can run once"):
        total.backward()


def test_broken_padding_changes_nothing() -> None:
    batch, given = rows(), distillation()
    expected = torch.autograd.grad(total_of(batch, given).total, learned(batch, given))
    broken = batch.student.detach().clone()
    broken[2], batch.teacher[2] = float("nan"), float("inf")
    batch = dataclasses.replace(batch, student=broken.requires_grad_())
    torch.testing.assert_close(torch.autograd.grad(total_of(batch, given).total, learned(batch, given)), expected)


def test_no_row_that_counts_is_a_loss_of_zero() -> None:
    batch = rows()
    nothing = dataclasses.replace(
        batch, labels=torch.full((ROWS,), -100), compared=torch.zeros(ROWS, dtype=torch.float64)
    )
    zero = torch.tensor(0.0)
    total = fused_linear_losses(nothing, distillation(), zero, zero).total
    total.backward()
    assert float(total.detach()) == 0 and not batch.student.grad.any()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_in_half_precision_gradients_are_no_further_off_than_with_all_logits(
    half: torch.dtype, autocast: bool
) -> None:
    """As a loss scaler makes them, and divided by so many tokens that half precision alone would lose them."""
    size, kind = 256, torch.float32 if autocast else half
    torch.manual_seed(0)
    student, teacher = linear(32, size, dtype=kind), linear(32, size, dtype=kind, seed=5)
    hidden, taught = torch.randn(64, 32).to(kind).requires_grad_(), torch.randn(64, 32).to(kind)
    labels, factor = torch.randint(size, (64,)), torch.tensor(1e-6)
    leaves, scale = [hidden, student.weight], 2.0**16

    def gradients(form: str) -> list[Tensor]:
        with torch.autocast("cpu", dtype=half, enabled=autocast and form != "exact"):
            if form == "fused":
                given = LanguageDistillation(LanguageHead(student), LanguageHead(teacher), 1.0, chunk_size=10)
                total = fused_linear_losses(
                    TokenRows(hidden, taught, labels, torch.ones(64)), given, factor, factor
                ).total
            else:
                wide = [entry.double() if form == "exact" else entry for entry in (hidden, student.weight, taught)]
                logits = F.linear(wide[0], wide[1]).to(torch.float64 if form == "exact" else torch.float32)
                theirs = F.linear(wide[2], teacher.weight.to(wide[2].dtype)).to(logits)
                kd = F.kl_div(logits.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="sum")
                total = (F.cross_entropy(logits, labels, reduction="sum") + kd) * factor
        return [entry.double() for entry in torch.autograd.grad(total * scale, leaves)]

    exact = gradients("exact")
    fused, dense = (
        [float((one - other).norm() / other.norm()) for one, other in zip(gradients(form), exact, strict=True)]
        for form in ("fused", "dense")
    )
    assert all(one <= 1.2 * other and one < 0.02 for one, other in zip(fused, dense, strict=True)), (fused, dense)
