"""What is shown of a training: loss terms and the association, averaged over logging windows, and warnings."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..losses import FeatureLoss
from ..losses.positions import entropy
from ..publishing.report.history import ASSOCIATION, LAYER_ERRORS
from .pair import Pair
from .plan import Plan, Services

logger = logging.getLogger(__name__)
TERMS = ("task_loss", "logit_loss", "feature_loss")
# Items of the task loss, summed beside the terms so that nothing else is read from the device.
ITEMS = "items"
# So many steps without one are no accident of small batches.
UNLABELED_STEPS = 10
# A weight this near to the largest possible one, the same for all samples, carries no information.
COLLAPSE_SHARE = 0.95
COLLAPSE_SPREAD = 0.01
# A mean task loss within these shares of that of equal probabilities is that of a student that has learned nothing;
# above them it has learned something else, such as a teacher that knows better than wrong labels.
IDLE_SHARES = (0.99, 1.05)
# Above it a mean loss term is a mistake of units.
LARGE_LOSS = 1e6
HIT_RATE = "teacher_cache/hit_rate"
# In fewer steps nobody expects one to have learned much.
IDLE_STEPS = 50
# The loss that tells is the mean over at least so many of the last steps: a window may be a single batch.
JUDGED_STEPS = 20


@dataclass(frozen=True)
class WindowAverages:
    """Unweighted loss terms with `association/entropy` in nats; mean and standard deviation (S, T) of the weights.

    `errors` are the association-weighted errors of the student layers (S), NaN where one is not compared; `counts` are
    sums over processes.
    """

    terms: dict[str, float]
    association: np.ndarray | None
    spread: np.ndarray | None
    errors: np.ndarray | None = None
    counts: tuple[int, ...] = ()

    def collapsed(self, upper_bound: float | None) -> bool:
        """Whether every student layer leans on one same teacher layer, to the bound, for every sample alike."""
        if self.association is None or self.spread is None or upper_bound is None or self.association.shape[1] < 2:
            return False
        winners = self.association.argmax(1)
        at_bound = self.association.max(1) >= COLLAPSE_SHARE * upper_bound
        return bool(at_bound.all() and (self.spread < COLLAPSE_SPREAD).all() and (winners == winners[0]).all())


@dataclass(frozen=True)
class CacheUse:
    """Samples for which cached teachers were asked, and those that they had to run on."""

    samples: int = 0
    computed: int = 0

    def __add__(self, other: CacheUse) -> CacheUse:
        return CacheUse(self.samples + other.samples, self.computed + other.computed)

    @property
    def hit_rate(self) -> float:
        """The share that came from the cache; samples that a training step runs twice count once."""
        return max(1 - self.computed / self.samples, 0.0) if self.samples else 0.0

    def __str__(self) -> str:
        stored = max(self.samples - self.computed, 0)
        return f"{stored:,} of {self.samples:,} samples came from it, and the teacher ran on {self.computed:,}"


class LossMeter:
    """Sums loss terms and association weights on the device, without waiting for it, until they are logged."""

    def __init__(self) -> None:
        self._terms: dict[str, Tensor] = {}
        self._association: Tensor | None = None
        self._shape: tuple[int, ...] = ()

    def add_term(self, name: str, share: Tensor) -> None:
        """Add a micro-batch's share of the window mean of a term (already divided by the window's items)."""
        share = _widened(share.detach())
        self._terms[name] = self._terms[name] + share if name in self._terms else share

    def add_association(self, weights: Tensor, errors: Tensor | None = None) -> None:
        """Add the association weights (B, S, T) of a micro-batch, and the errors of its pairs, if there are any."""
        weights = _widened(weights.detach())
        sums = torch.stack([weights.sum(0), weights.square().sum(0)]).flatten()
        extra = torch.stack([weights.new_full((), float(len(weights))), entropy(weights).mean(1).sum()])
        # Packed with the weights, so that a window stays one reduction.
        weighted = [] if errors is None else [(weights * errors.detach()).sum((0, 2))]
        packed = torch.cat([sums, extra, *weighted])
        self._shape = tuple(weights.shape[1:])
        self._association = packed if self._association is None else self._association + packed

    @property
    def empty(self) -> bool:
        """Whether nothing was added since the last `average`."""
        return not self._terms and self._association is None

    def average(
        self, steps: int, reduce_sum: Callable[[Tensor], Tensor], counts: Sequence[int] = ()
    ) -> WindowAverages:
        """Return the averages over the optimizer steps since the last call, on all processes, and start anew.

        `counts` of this process are added over all of them on the way.
        """
        names = [name for name in (*TERMS, ITEMS) if name in self._terms]
        parts = [self._terms[name].reshape(1) for name in names]
        if self._association is not None:
            parts.append(self._association)
        parts.append(torch.tensor(counts, dtype=parts[0].dtype, device=parts[0].device))
        sums = reduce_sum(torch.cat(parts)).cpu().double().numpy()
        sums, totals = np.split(sums, [len(sums) - len(counts)])
        terms = {name: float(sums[index]) / max(steps, 1) for index, name in enumerate(names)}
        found = WindowAverages(terms, None, None)
        if self._association is not None:
            found = self._unpack(terms, sums[len(names) :])
        self._terms, self._association = {}, None
        return replace(found, counts=tuple(map(int, totals)))

    def _unpack(self, terms: dict[str, float], sums: np.ndarray) -> WindowAverages:
        pairs = math.prod(self._shape)
        first, second, rest = np.split(sums, [pairs, 2 * pairs])
        samples = max(rest[0], 1.0)
        mean, square = (part.reshape(self._shape) / samples for part in (first, second))
        terms["association/entropy"] = float(rest[1] / samples)
        errors = rest[2:] / samples if len(rest) > 2 else None
        return WindowAverages(terms, mean, np.sqrt(np.clip(square - mean**2, 0, None)), errors)


def _widened(tensor: Tensor) -> Tensor:
    """Return the tensor in the widest precision of its device: sums over long windows then lose nothing."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


class Monitor:
    """Averages loss terms and association weights over logging windows.

    Nothing is read from the device before a window ends, and a window costs one reduction over processes.
    `judges_student` tells whether a task loss at chance means that the student has learned nothing; `task_losses`
    holds steps and mean task loss of the last windows.
    """

    def __init__(self, plan: Plan, pair: Pair, loss: FeatureLoss | None, services: Services):
        self.plan, self.services = plan, services
        self.student_layers, self.teacher_layers = pair.student_layer_names, pair.teacher_layer_names
        self.upper_bound = None if loss is None else loss.upper_bound
        classifies = plan.task == "single_label" and plan.classes is not None and plan.classes > 1
        learns_features = loss is not None and not loss.reuses_teacher_head and plan.feature_weight > 0
        self.judges_student = classifies and learns_features and services.custom_loss is None
        self.last_association: np.ndarray | None = None
        self.last_errors: np.ndarray | None = None
        self._warned_of_collapse = self._warned_of_size = self._warned_of_labels = False
        self._cached_teachers = pair.cached_teachers
        self.start(0)

    def start(self, step: int) -> None:
        """Begin a logging window at an optimizer step, forgetting what was summed before."""
        self._meter = LossMeter()
        self.task_losses: deque[tuple[int, float]] = deque()
        self._started_at = self._averaged_to = step
        self._unlabeled = 0
        self.cache_use = CacheUse()
        self._samples, self._computed = 0, sum(teacher.computed for teacher in self._cached_teachers)

    def record(
        self,
        terms: Mapping[str, Tensor],
        features: Mapping[str, Tensor] | None,
        samples: int,
        items: Tensor | None = None,
    ) -> None:
        """Add a micro-batch's shares of the terms, the association weights among its features, samples and items."""
        self._samples += samples * len(self._cached_teachers)
        for name, value in terms.items():
            self._meter.add_term(name, value)
        if items is not None and "task_loss" in terms and self.services.custom_loss is None:
            self._meter.add_term(ITEMS, items.to(terms["task_loss"].device, non_blocking=True))
        if features is not None and "association" in features:
            self._meter.add_association(features["association"], features.get("errors"))

    def finish(self, step: int) -> dict[str, float]:
        """End the logging window on all processes at once; return its terms and keep its association."""
        if self._meter.empty:
            return {}
        steps = step - self._averaged_to
        averages = self._meter.average(steps, self.services.reduce_sum, self._cache_counts())
        self._averaged_to = step
        self._look_for_labels(averages.terms.pop(ITEMS, 1.0), steps)
        if averages.counts:
            window = CacheUse(*averages.counts)
            self.cache_use = self.cache_use + window
            averages.terms[HIT_RATE] = window.hit_rate
        if "task_loss" in averages.terms:
            self.task_losses.append((steps, averages.terms["task_loss"]))
            # Only the last windows, which make up `JUDGED_STEPS` steps.
            while sum(count for count, _ in self.task_losses) - self.task_losses[0][0] >= JUDGED_STEPS:
                self.task_losses.popleft()
        large = {name: value for name, value in averages.terms.items() if name in TERMS and value > LARGE_LOSS}
        if large and self.services.is_main and not self._warned_of_size:
            self._warned_of_size = True
            logger.warning(
                "The %s is %.3g on average: values of this size drown everything else. Check the inputs' "
                "normalization and the labels' scale, or lower its weight.",
                *next(iter(large.items())),
            )
        if averages.association is not None:
            self.last_association, self.last_errors = averages.association, averages.errors
            if averages.collapsed(self.upper_bound):
                self._warn_of_collapse(averages.association)
        return averages.terms

    def _cache_counts(self) -> list[int]:
        """Return how many samples the cached teachers were asked for since the last call, and ran on."""
        if not self._cached_teachers:
            return []
        before, self._computed = self._computed, sum(teacher.computed for teacher in self._cached_teachers)
        samples, self._samples = self._samples, 0
        return [samples, self._computed - before]

    def history_entries(self) -> dict[str, Any]:
        """Return what a trainer's history keeps of the last window besides the terms, ready for JSON."""
        if self.last_association is None:
            return {}
        entries: dict[str, Any] = {ASSOCIATION: self.last_association.tolist()}
        if self.last_errors is not None:
            entries[LAYER_ERRORS] = [None if math.isnan(error) else error for error in self.last_errors.tolist()]
        return entries

    def warn_of_idle_student(self, step: int, learning_rate: float) -> None:
        """Warn when a classifier ends as it began, at chance: too strong a feature term can do that to a student.

        Where classes are unbalanced, chance is below equal probabilities, and nothing is said. Nor is there where the
        student ends with the teacher's classifier: its own says nothing.
        """
        steps = step - self._started_at
        if not self.judges_student or not self.task_losses or steps < IDLE_STEPS:
            return
        assert self.plan.classes is not None
        judged = sum(count for count, _ in self.task_losses)
        loss = sum(count * value for count, value in self.task_losses) / max(judged, 1)
        chance = math.log(self.plan.classes)
        if IDLE_SHARES[0] <= loss / chance <= IDLE_SHARES[1] and self.services.is_main:
            logger.warning(
                "The student seems not to have learned its task: the task loss ended at %.3f, and equal "
                "probabilities for all %d classes give %.3f. The feature term may be why: it slows the first steps "
                "down. Lower feature_weight (it is %g), raise learning_rate (it is %g), or train for more steps "
                "(these were %d).",
                loss,
                self.plan.classes,
                chance,
                self.plan.feature_weight,
                learning_rate,
                steps,
            )

    def _look_for_labels(self, items: float, steps: int) -> None:
        """Warn once where no label counted in many steps, one window after the other."""
        self._unlabeled = 0 if items else self._unlabeled + steps
        if self._unlabeled >= UNLABELED_STEPS and self.services.is_main and not self._warned_of_labels:
            self._warned_of_labels = True
            ignored = " or ".join(map(str, self.plan.own_loss.ignored))
            logger.warning(
                "No label counted in the last %d steps, so the task loss taught nothing: %s. Look at the labels of a "
                "batch, and at what makes them (a collator that does not find its response template ignores all), or "
                "set task_weight=0.",
                self._unlabeled,
                "all answers are outside their texts" if self.plan.own_loss.finds_ends else f"all are {ignored}",
            )

    def _warn_of_collapse(self, association: np.ndarray) -> None:
        """Warn once that the association carries no information."""
        if self.services.is_main and not self._warned_of_collapse:
            self._warned_of_collapse = True
            logger.warning(
                "The association has collapsed: every student layer leans on teacher layer %s as far as it can, for "
                "every sample alike, so it carries no information. Use association='similarity', or raise "
                "association_temperature.",
                self.teacher_layers[int(association[0].argmax())],
            )
