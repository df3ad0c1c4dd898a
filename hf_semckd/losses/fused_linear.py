"""Task and logit loss of causal language models from hidden states and heads, never with all logits at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..data.columns import IGNORED
from ..features.precision import at_least_float32, full_precision
from ..models.language_head import LanguageHead

# Logits of a model that are held at once, where the number of positions in a chunk is not given.
CHUNK = 2**23


@dataclass(frozen=True, eq=False)
class TokenRows:
    """R positions of a batch, one after the other, and what is learned at them.

    Attributes:
        student, teacher: Last hidden states (R, D) and (R, D').
        labels: (R) the next tokens, -100 where there is none; None without a task loss.
        compared: (R) how much the divergence of the logits counts.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    compared: Tensor

    def at(self, place: slice) -> TokenRows:
        """Return some of the rows; what does not count in them is 0, so that NaN in padding changes nothing."""
        labels, compared = None if self.labels is None else self.labels[place], self.compared[place]
        left_out = (compared == 0).unsqueeze(1)
        teacher = self.teacher[place].masked_fill(left_out, 0.0)
        if labels is not None:
            left_out = left_out & (labels == IGNORED).unsqueeze(1)
        return TokenRows(self.student[place].masked_fill(left_out, 0.0), teacher, labels, compared)


@dataclass(frozen=True)
class LanguageDistillation:
    """What is minimized of the logits of two models.

    Attributes:
        head, teacher_head: Make logits of the same tokens; the teacher's gets no gradient.
        temperature: Of the divergence, > 0.
        vocabulary: Number of token ids that are compared; None: all.
        chunk_size: Positions that become logits at once; None: as many as make `CHUNK` logits.
    """

    head: LanguageHead
    teacher_head: LanguageHead
    temperature: float
    vocabulary: int | None = None
    chunk_size: int | None = None


@dataclass(frozen=True)
class LanguageLosses:
    """Scalars: the sums `task` and `logit`, without gradient, and `total`, of both times their factors, with it."""

    total: Tensor
    task: Tensor
    logit: Tensor


def fused_linear_losses(
    rows: TokenRows, distillation: LanguageDistillation, task_factor: Tensor, logit_factor: Tensor
) -> LanguageLosses:
    """Return the sums over rows of cross-entropy and `kd_loss`, and their weighted sum with its gradient.

    A chunk of rows at a time becomes logits, losses and, in the same pass, gradients of the student's hidden states
    and head; backward only scales them, and can run once. The dense form takes the same matrix products, and keeps
    tensors (R, V). Under autocast products are in its precision; losses and sums of gradients are at least in float32.

    Source: the fused linear cross-entropy and JSD of Liger Kernel (Hsu et al., 2024, arXiv 2410.10989).

    Args:
        rows: The student's hidden states are those whose gradient is computed.
        distillation: The heads, and how their logits are compared.
        task_factor, logit_factor: Scalars >= 0 that the sums are multiplied by in the total.
    """
    linear, factors = distillation.head.linear, (task_factor, logit_factor)
    return LanguageLosses(*_FusedLinear.apply(rows.student, linear.weight, linear.bias, rows, distillation, factors))


class _FusedLinear(torch.autograd.Function):
    """Computes losses and gradients in one pass; see `fused_linear_losses`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: TokenRows,
        distillation: LanguageDistillation,
        factors: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, ...]:
        like = at_least_float32(hidden[:0])
        task_factor, logit_factor = (factor.to(like) for factor in factors)
        # Half precision would lose gradients that are divided by the number of tokens: the larger factor is
        # multiplied in last, in full precision.
        common = torch.maximum(task_factor, logit_factor)
        common = torch.where(common > 0, common, torch.ones_like(common))
        shares = task_factor / common, logit_factor / common
        project, teach = _Projection(distillation.head), _Projection(distillation.teacher_head)
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        size = distillation.chunk_size or max(CHUNK // len(weight), 1)
        sums = like.new_zeros(2)
        with full_precision(hidden):
            for first in range(0, len(hidden), size):
                place = slice(first, first + size)
                chunk = rows.at(place)
                gradient = _add_chunk(sums, chunk, project, teach, distillation, shares)
                gradients.add(place, chunk.student, gradient, project)
                # Before the next chunk's.
                del gradient
        ctx.gradients, ctx.common = gradients, common
        task, logit = sums.unbind()
        ctx.mark_non_differentiable(task, logit)
        return task_factor * task + logit_factor * logit, task, logit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("fused_linear_losses gives its gradients away: backward can run once")
        return (*gradients.scaled(outer * ctx.common), None, None, None)


def _add_chunk(
    sums: Tensor,
    rows: TokenRows,
    project: _Projection,
    teach: _Projection,
    distillation: LanguageDistillation,
    shares: tuple[Tensor, Tensor],
) -> Tensor:
    """Add a chunk's cross-entropy and divergence to `sums` (2); return the gradient (R, V) of the head's outputs.

    It is that of the two sums, each times its share. In place wherever possible: every tensor here is large.
    """
    temperature, cut = distillation.temperature, slice(distillation.vocabulary)
    log_teacher = _log_softmax(teach(rows.teacher)[:, cut], temperature)
    probability = log_teacher.exp()
    logits = project(rows.student)
    log_student = _log_softmax(logits[:, cut], temperature)
    compared = rows.compared.to(log_student.dtype).unsqueeze(1)
    divergence = log_teacher.sub_(log_student).mul_(probability).sum(1, keepdim=True)
    del log_teacher
    sums[1] += (divergence * compared).sum() * temperature**2
    compared = compared * (shares[1] * temperature)
    if rows.labels is None:
        gradient = torch.zeros_like(logits, dtype=log_student.dtype)
    else:
        log_task = log_student if temperature == 1 and log_student.shape == logits.shape else _log_softmax(logits, 1.0)
        labels, labeled = rows.labels.clamp(min=0).unsqueeze(1), (rows.labels != IGNORED).unsqueeze(1)
        sums[0] -= (log_task.gather(1, labels) * labeled).sum()
        labeled = labeled * shares[0]
        if log_task is log_student:
            gradient = log_task.exp_().mul_(labeled + compared).sub_(probability.mul_(compared))
            return project.backward(gradient.scatter_add_(1, labels, -labeled), logits)
        gradient = log_task.exp_().mul_(labeled).scatter_add_(1, labels, -labeled)
    gradient[:, cut] += log_student.exp_().sub_(probability).mul_(compared)
    return project.backward(gradient, logits)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities over the last dimension, at least in float32: a tensor of its own."""
    logits = at_least_float32(logits)
    return F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


class _Projection:
    """A head as autocast would run it: its weights are cast once, not once a chunk."""

    def __init__(self, head: LanguageHead):
        weight, bias = head.linear.weight.detach(), head.linear.bias
        kind, dtype = weight.device.type, weight.dtype
        if torch.is_autocast_enabled(kind) and dtype is not torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        self.head, self.weight = head, weight.to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits (R, V) of hidden states (R, D)."""
        return self.head.finish(F.linear(hidden.to(self.weight.dtype), self.weight, self.bias))

    def backward(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Return the gradient of the linear layer's outputs, in its precision; that of the logits is used up."""
        if self.head.soft_cap is not None:
            gradient.sub_(gradient * (logits / self.head.soft_cap).square_())
        if self.head.scale != 1.0:
            gradient.mul_(self.head.scale)
        return gradient.to(self.weight.dtype)


class _Gradients:
    """Sums of gradients, at least in float32, of the hidden states, weight and bias that need one."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...]):
        given = [entry if wanted else None for entry, wanted in zip((hidden, weight, bias), needed, strict=False)]
        self.dtypes = [None if entry is None else entry.dtype for entry in given]
        self.hidden, self.weight, self.bias = map(_zeros, given)

    def add(self, place: slice, hidden: Tensor, gradient: Tensor, project: _Projection) -> None:
        """Add what a chunk of hidden states (R, D) gives by the gradient (R, V) of the linear layer's outputs."""
        if self.hidden is not None:
            self.hidden[place] = gradient @ project.weight
        if self.weight is not None and self.weight.dtype == gradient.dtype:
            self.weight.addmm_(gradient.t(), hidden.to(gradient.dtype))
        elif self.weight is not None:
            self.weight += gradient.t() @ hidden.to(gradient.dtype)
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)

    def scaled(self, factor: Tensor) -> list[Tensor | None]:
        """Return the sums times a factor, in the precision of what they are gradients of; they are used up."""
        sums = zip((self.hidden, self.weight, self.bias), self.dtypes, strict=True)
        return [None if entry is None else entry.mul_(factor).to(dtype) for entry, dtype in sums]


def _zeros(like: Tensor | None) -> Tensor | None:
    """Return zeros of a shape, at least in float32."""
    return None if like is None else like.new_zeros(like.shape, dtype=at_least_float32(like[:0]).dtype)
