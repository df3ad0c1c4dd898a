"""Student and teacher on the same samples: agreement, calibration, and where they differ most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Subset

from ..data.columns import IGNORED
from ..data.samples import is_map_style
from ..data.views import preserved_random_state
from ..errors import InputError
from ..models.inputs import evaluating, input_device
from ..models.outputs import base_model
from ..publishing.report.parts import Comparison, Example, Reliability
from .decisions import DecisionCollector, Decisions, Labeling, find_labeling, labels_of, positions
from .metrics import agreement, calibration_error, confidence_bins, find_metric
from .runtimes import PyTorch
from .shown import shown_picture, shown_text
from .variants import LabeledData, Variant, class_order, usual_collator

SAMPLES, EXAMPLES = 512, 10
MEASURES = {
    "classes": "total variation between their probabilities (from 0 to 1)",
    "multi_label": "mean difference of their probabilities (from 0 to 1)",
    "regression": "mean difference of their numbers",
}
ALONG = ", the mean over a sample's labeled positions"


def compare_predictions(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    dataset: Any,
    *,
    weights: Sequence[float] = (1.0,),
    processing_class: Any = None,
    data_collator: Any = None,
    batch_size: int = 8,
    samples: int = SAMPLES,
) -> Comparison:
    """Run student and teacher over labeled samples, spread over a data set, and return how they compare.

    Several teachers are one: the weighted mean of their probabilities. Raises `InputError` for data without labels,
    or models that do not fit to them.
    """
    if not is_map_style(dataset) or isinstance(dataset, Mapping) or not len(dataset):
        raise InputError(
            "There are no samples to compare student and teacher on",
            received=f"a {type(dataset).__name__}",
            expected="a map-style data set with labels, of one sample at least",
            todo="pass one as dataset, for example dataset=data['test']",
        )
    places = [n * len(dataset) // min(samples, len(dataset)) for n in range(min(samples, len(dataset)))]
    chosen = dataset.select(places) if isinstance(dataset, Dataset) else Subset(dataset, places)
    data = LabeledData(chosen, data_collator or usual_collator(processing_class), (*teachers, student))
    with evaluating(*teachers, student), torch.inference_mode(), preserved_random_state(0):
        variants = [_variant(model, student) for model in (*teachers, student)]
        found = _Run.over(data, variants, weights, batch_size)
    metric = find_metric(None, found.labeling)
    made = {"teacher": found.teacher, "student": found.student}
    order = np.argsort(-found.differences, kind="stable")[: min(EXAMPLES, len(places))]
    shown = [n for n in order if found.differences[n] > 0]
    names = getattr(getattr(base_model(student), "config", None), "id2label", None) or {}
    along = ALONG if len(found.student.samples) > found.student.count else ""
    return Comparison(
        samples=len(places),
        metric=metric.name,
        quality={role: metric(own) for role, own in made.items()},
        agreement=agreement(found.student, found.teacher),
        measure=MEASURES.get(found.labeling.kind, MEASURES["classes"]) + along,
        reliability=tuple(
            Reliability(role, calibration_error(own) or 0.0, bins)
            for role, own in made.items()
            if (bins := confidence_bins(own))
        ),
        examples=tuple(
            _example(found, n, places[n], names, dataset[places[n]], processing_class) for n in map(int, shown)
        ),
    )


def _variant(model: nn.Module, student: nn.Module) -> Variant:
    runtime = PyTorch(model, input_device(model))
    order = None if model is student else class_order(model, student)
    return Variant("", runtime, runtime, None, None, model is not student, order)


@dataclass(frozen=True)
class _Run:
    """What both decide about the same samples, and the difference of each sample (N)."""

    labeling: Labeling
    student: Decisions
    teacher: Decisions
    differences: np.ndarray

    @classmethod
    def over(cls, data: LabeledData, variants: Sequence[Variant], weights: Sequence[float], size: int) -> _Run:
        """Run all models over the data; the last one is the student."""
        first, student = data.first(2), variants[-1]
        labeling = find_labeling(student.pytorch.model, student.batch(first))
        collectors = DecisionCollector(labeling, "student"), DecisionCollector(labeling, "teacher")
        differences = []
        for batch in data.batches(size):
            labels = labels_of(batch)
            own = student.logits(batch).float()
            given = [variant.logits(batch).float().to(own.device) for variant in variants[:-1]]
            theirs = given[0] if len(given) == 1 else _mean_logits(given, weights, labeling)
            if labeling.kind != "regression" and own.shape[-1] != theirs.shape[-1] and own.dim() == 3:
                # One of both vocabularies was padded to a round size.
                width = min(own.shape[-1], theirs.shape[-1])
                own, theirs = own[..., :width], theirs[..., :width]
            for collector, logits in zip(collectors, (own, theirs), strict=True):
                collector.add(logits, labels)
            differences.append(_differences(own, theirs, labels.to(own.device), labeling).cpu())
        own_decisions, their_decisions = (collector.decisions() for collector in collectors)
        return cls(labeling, own_decisions, their_decisions, torch.cat(differences).numpy())


def _mean_logits(given: Sequence[Tensor], weights: Sequence[float], labeling: Labeling) -> Tensor:
    """Return logits whose probabilities are the weighted mean of those of several teachers."""
    classes = 1 if labeling.kind == "spans" or given[0].dim() == 4 else -1
    shares = [_probabilities(entry, labeling, classes) * weight for entry, weight in zip(given, weights, strict=True)]
    mean = torch.stack(shares).sum(0)
    if labeling.kind == "regression":
        return mean
    return torch.logit(mean, 1e-6) if labeling.kind == "multi_label" else mean.clamp(min=1e-30).log()


def _probabilities(logits: Tensor, labeling: Labeling, classes: int = -1) -> Tensor:
    if labeling.kind == "regression":
        return logits
    return logits.sigmoid() if labeling.kind == "multi_label" else logits.softmax(classes)


def _differences(own: Tensor, theirs: Tensor, labels: Tensor, labeling: Labeling) -> Tensor:
    """Return the difference of each sample (B), the mean over its labeled positions; 0 where it has none."""
    scores, targets = positions(own, labels, labeling)
    others, _ = positions(theirs, labels, labeling)
    if scores.shape != others.shape:
        raise InputError(
            "The predictions of student and teacher cannot be compared",
            received=f"logits {tuple(own.shape)} and {tuple(theirs.shape)}",
            expected="the same classes",
            todo="compare models of the same task",
        )
    gaps = (_probabilities(scores, labeling) - _probabilities(others, labeling)).abs()
    if labeling.kind in ("regression", "multi_label"):
        return gaps.flatten(1).mean(1)
    kept = ((targets != IGNORED) & (targets != labeling.ignored)).flatten().view(len(targets), -1)
    distances = 0.5 * gaps.sum(-1).view(len(targets), -1)
    return (distances * kept).sum(1) / kept.sum(1).clamp(min=1)


def _example(found: _Run, n: int, index: int, names: Mapping[Any, Any], row: Any, processing_class: Any) -> Example:
    """Return a sample with what both predict, by name."""
    at = np.flatnonzero(found.student.samples == n)
    return Example(
        index,
        float(found.differences[n]),
        student=_predicted(found.student, at, found.labeling, names),
        teacher=_predicted(found.teacher, at, found.labeling, names),
        label=_label(found.student, at, found.labeling, names),
        student_confidence=_confidence(found.student, at, found.labeling),
        teacher_confidence=_confidence(found.teacher, at, found.labeling),
        text=shown_text(row, processing_class),
        picture=shown_picture(row, processing_class),
    )


def _predicted(made: Decisions, at: np.ndarray, labeling: Labeling, names: Mapping[Any, Any]) -> str:
    """Return what is predicted at the positions of a sample; of many, how many of them are right."""
    if labeling.kind in ("regression", "multi_label") or len(at) == 1:
        return _text(made.predicted[at], labeling, names)
    return f"{int((made.predicted[at] == made.labels[at]).sum())} of {len(at)} positions right"


def _confidence(made: Decisions, at: np.ndarray, labeling: Labeling) -> float | None:
    single = len(at) == 1 and labeling.kind != "multi_label"
    return float(made.confidence[at[0]]) if single and made.confidence is not None else None


def _label(made: Decisions, at: np.ndarray, labeling: Labeling, names: Mapping[Any, Any]) -> str | None:
    single = labeling.kind in ("regression", "multi_label") or len(at) == 1
    return _text(made.labels[at], labeling, names) if single else None


def _text(values: np.ndarray, labeling: Labeling, names: Mapping[Any, Any]) -> str:
    if labeling.kind == "regression":
        return ", ".join(f"{value:.4g}" for value in values.ravel())
    chosen = np.flatnonzero(values > 0) if labeling.kind == "multi_label" else values
    return ", ".join(str(names.get(int(label), int(label))) for label in chosen) or "none"
