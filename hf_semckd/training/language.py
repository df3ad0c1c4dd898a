"""Whether the losses of a causal language model are computed without all its logits at once, and of what."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..config import SemCKDConfig
from ..data.columns import IGNORED
from ..errors import InputError
from ..features.precision import at_least_float32
from ..losses.fused_linear import LanguageDistillation, TokenRows, fused_linear_losses
from ..models.inputs import InputSelector, evaluating
from ..models.language_head import LanguageHead, UnprovenHeadError, find_language_head
from ..models.outputs import token_targets
from ..models.packing import document_starts
from ..models.tasks import shifts_labels
from ..teacher.placement import is_spread
from ..teacher.teacher import Teacher
from .counts import StepCounts
from .pair import Pair
from .plan import Plan, Services

logger = logging.getLogger(__name__)
# From this number of token ids on, unless the configuration tells; see docs/results/cost.md.
LARGE_VOCABULARY = 2**12
# Of the texts that models with a large vocabulary are tried on: all logits of longer ones may not fit.
TRIED_TOKENS = 64


@dataclass(frozen=True, eq=False)
class LanguageTargets:
    """What the student's forward needs to compute both losses of a micro-batch.

    Attributes:
        teacher: (B, N, D') what the teacher's head reads.
        labels: (B, N) the next tokens, -100 where there is none; None without a task loss.
        compared: (B, N) how much the divergence counts.
        task_factor, logit_factor: Turn sums into what is minimized.
    """

    distillation: LanguageDistillation
    teacher: Tensor
    labels: Tensor | None
    compared: Tensor
    task_factor: Tensor
    logit_factor: Tensor

    @classmethod
    def of(
        cls, plan: Plan, teacher: Tensor | None, batch: Mapping[str, Any], counts: StepCounts
    ) -> LanguageTargets | None:
        """Return the targets of a batch, by the teacher's hidden states; None where the losses need all logits."""
        labels: Any = batch.get("labels")
        if plan.language is None or teacher is None or (plan.task_weight > 0 and labels is None):
            return None
        rest = teacher.shape[1] - 1
        mask = token_targets(labels, batch.get("attention_mask"), True, document_starts(batch))
        kind = at_least_float32(teacher[:0]).dtype
        # Items are samples where nothing tells which tokens count.
        compared = teacher.new_full((len(teacher), rest), 1 / rest, dtype=kind) if mask is None else mask.to(kind)
        return cls(
            plan.language,
            teacher,
            F.pad(labels[:, 1:], (0, 1), value=IGNORED) if plan.task_weight > 0 else None,
            F.pad(compared, (0, 1)),
            plan.task_weight * counts.task_sum_scale(),
            plan.logit_weight * counts.logit_scale(),
        )

    def losses(self, hidden: Tensor) -> dict[str, Tensor]:
        """Return `total`, and the sums `task` and `logit`, for what the student's head reads (B, N, D)."""
        shapes = [tuple(entry.shape[:2]) for entry in (hidden, self.teacher, self.compared)]
        if len({*shapes}) > 1:
            raise InputError(
                "Student, teacher and labels have different numbers of tokens",
                received="(samples, tokens): student {}, teacher {}, labels {}".format(*shapes),
                expected="one number for all",
                todo="check the collator: teacher_input_ids must be the student's, and labels as long",
            )
        labels = None if self.labels is None else self.labels.flatten()
        rows = TokenRows(hidden.flatten(0, 1), self.teacher.flatten(0, 1), labels, self.compared.flatten())
        found = fused_linear_losses(rows, self.distillation, self.task_factor, self.logit_factor)
        return {"total": found.total, "task": found.task, "logit": found.logit}


def tried_batch(pair: Pair, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the beginning of the texts of a small batch, where all logits of whole texts would take much memory.

    Only of plain texts without padding in front or in their beginning, and with labels there if they have some.
    """
    ids: Any = batch.get("input_ids")
    vocabulary = getattr(getattr(pair.student, "config", None), "vocab_size", None)
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    plain = {*tensors} <= {"input_ids", "attention_mask", "labels"} and isinstance(ids, Tensor) and ids.dim() == 2
    large = isinstance(vocabulary, int) and vocabulary >= LARGE_VOCABULARY and shifts_labels(pair.student)
    if not plain or not large or pair.cached_teachers or any(entry.shape != ids.shape for entry in tensors.values()):
        return batch
    cut = {**batch, **{name: value[:, :TRIED_TOKENS] for name, value in tensors.items()}}
    padded = "attention_mask" in cut and bool((cut["attention_mask"] == 0).any())
    unlabeled = "labels" in cut and bool((cut["labels"][:, 1:] == IGNORED).all())
    return batch if padded or unlabeled else cut


def find_language_distillation(
    pair: Pair, plan: Plan, batch: Mapping[str, Any], vocabulary: int, args: SemCKDConfig, services: Services
) -> LanguageDistillation | None:
    """Return how both losses are computed without all logits at once, or None where they are computed densely.

    `vocabulary` is the number of the student's logits of a token. Why it cannot be done is said in one line where it
    was asked for, or where the vocabulary is large.
    """
    size = args.logit_chunk_size
    wanted = vocabulary >= LARGE_VOCABULARY if size is None else size > 0
    if not wanted or not plan.distills_logits:
        return None
    reason = _obstacle(pair, plan, batch, args, services)
    if reason is None:
        try:
            return _proven(pair, plan, batch, size)
        except UnprovenHeadError as error:
            reason = str(error)
    if services.is_main:
        logger.warning("All %d logits of every token are computed at once: %s.", vocabulary, reason)
    return None


def _obstacle(pair: Pair, plan: Plan, batch: Mapping[str, Any], args: SemCKDConfig, services: Services) -> str | None:
    """Return why the losses have to be computed densely whatever the heads are like; None if they need not."""
    own_loss = services.custom_loss is not None or services.label_smoother is not None
    devices = {str(entry.device) for model in (pair.student, pair.teacher.model) for entry in model.parameters()}
    obstacles = {
        "this is no causal language model": plan.task != "tokens" or not plan.shifts_labels,
        "there are several teachers": len(pair.teachers) > 1,
        "the teacher cache stores logits": not isinstance(pair.teacher, Teacher),
        "compute_loss_func and label smoothing take logits": own_loss and plan.task_weight > 0,
        "the student computes no loss": not plan.student_computes_loss and plan.task_weight > 0,
        "the labels are not in a column of that name": "labels" not in batch and plan.task_weight > 0,
        "compiled models do not show what their heads read": args.torch_compile or args.teacher_compile,
        "FSDP and DeepSpeed may shard the heads": services.shards,
        "the classes of both models have another order": plan.match.order is not None,
        "a model is spread over several devices or sharded": len(devices) > 1
        or is_spread(pair.student)
        or is_spread(pair.teacher.model),
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


def _proven(pair: Pair, plan: Plan, batch: Mapping[str, Any], size: int | None) -> LanguageDistillation:
    """Return the distillation with both heads, proven on a batch; `UnprovenHeadError` where one cannot be."""
    models = {"student": pair.student, "teacher": pair.teacher.model}
    inputs = {"student": InputSelector(pair.student)(batch), "teacher": pair.teacher.inputs(batch)}
    heads: dict[str, LanguageHead] = {}
    for role, model in models.items():
        try:
            with evaluating(model):
                own_loss = role == "student" and plan.task_weight > 0
                heads[role] = find_language_head(model, inputs[role], loss=own_loss)
        except UnprovenHeadError as error:
            raise UnprovenHeadError(f"of the {role}, {type(model).__name__}: {error}") from error
    return LanguageDistillation(heads["student"], heads["teacher"], plan.temperature, plan.match.vocabulary, size)
