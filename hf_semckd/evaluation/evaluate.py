"""Models side by side on the same data: quality, the share of it that is kept, size, memory and latency."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.samples import is_map_style
from ..errors import InputError
from ..models.inputs import evaluating
from ..models.latency import interleaved_times
from ..models.loading import ModelSource, load_model
from ..publishing.facts import environment
from .decisions import Decisions, Labeling, collect_decisions, find_labeling
from .export import check_installed
from .metrics import Metric, agreement, calibration_error, find_metric, share_kept
from .rows import Latency, Row
from .table import Evaluation
from .variants import LabeledData, Variant, make_variants, usual_collator

BATCH_SIZE = 32
LATENCY_BATCHES = (1, 32)


def evaluate(
    models: Mapping[str, ModelSource],
    dataset: Any,
    *,
    processing_class: Any = None,
    data_collator: Any = None,
    metric: Any = None,
    onnx: bool | None = None,
    memory: bool = True,
    latency_batches: Sequence[int] = LATENCY_BATCHES,
    seconds: float = 1.0,
    seed: int = 0,
) -> Evaluation:
    """Evaluate models on the same labeled data, and measure what they cost on this machine.

    The first model is the reference, usually the teacher. Latencies are those of the forward pass, on the CPU and on a
    GPU if there is one, all models in turns; see `share_kept` and `calibration_error` for the other columns.

    Args:
        models: Name in the table: model, name or folder.
        dataset: Map-style, prepared and labeled as for `Trainer.evaluate`; columns `teacher_*` are the reference's.
        processing_class: The tokenizer that pads the samples, if `data_collator` does not.
        metric: `accuracy`, `f1`, `matthews_correlation`, `exact_match`, `perplexity`, `pearson`, what
            `evaluate.load` returns, or a function of predictions and labels. None: the usual one of the task.
        onnx: Whether to measure the models as ONNX files, in float32 and with int8 weights. None: where the packages
            are installed, and the model can be exported.
        memory: Whether to measure peak memory, which starts a process for each row.
        latency_batches: Numbers of samples for which times are measured.
        seconds: Time for which each latency is measured.
        seed: Of the draws of the bootstrap.

    Raises `InputError` for data without labels, or models that do not fit to them.

    Example:
        >>> print(evaluate({"teacher": teacher, "student": student}, test_data))  # doctest: +SKIP
    """
    _check(models, dataset, onnx)
    loaded = {name: load_model(model, name) for name, model in models.items()}
    data = LabeledData(dataset, data_collator or usual_collator(processing_class), tuple(loaded.values()))
    with tempfile.TemporaryDirectory() as folder, evaluating(*loaded.values()):
        variants, notes = make_variants(loaded, data, Path(folder), onnx)
        labeling = find_labeling(variants[0].pytorch.model, variants[0].batch(data.first(2)))
        chosen = find_metric(metric, labeling)
        decided = [_decisions(variant, data, labeling) for variant in variants]
        latencies = _latencies(variants, data, latency_batches, seconds)
        peaks = [variant.peak(data.first(max(latency_batches))) if memory else None for variant in variants]
    measured = zip(variants, decided, latencies, peaks, strict=True)
    rows = tuple(_row(*entry, decided[0], chosen, seed) for entry in measured)
    shapes = {count: data.shapes(count) for count in latency_batches}
    return Evaluation(rows, chosen.name, decided[0].count, shapes, environment(), tuple(notes))


def _check(models: Mapping[str, ModelSource], dataset: Any, onnx: bool | None) -> None:
    if isinstance(dataset, Mapping) or not is_map_style(dataset):
        raise InputError(
            "This data set has no samples with an index",
            received=f"a {type(dataset).__name__}"
            + (f" of {', '.join(dataset)}" if isinstance(dataset, Mapping) else ""),
            expected="a map-style data set, such as one split of a datasets.Dataset",
            todo="pass one split, such as data['test'], loaded without streaming",
        )
    if not models or not len(dataset):
        raise InputError(
            "There is nothing to evaluate",
            received=f"{len(models)} models and {len(dataset)} samples",
            expected="at least one of each",
            todo="pass {name: model}, and labeled samples",
        )
    if onnx:
        check_installed()


def _row(
    variant: Variant,
    made: Decisions,
    latency: tuple[Latency, ...],
    peak: int | None,
    reference: Decisions,
    metric: Metric,
    seed: int,
) -> Row:
    return Row(
        model=variant.model,
        runtime=variant.runtime.name,
        device=variant.runtime.device,
        quality=metric(made),
        kept=share_kept(metric, made, reference, seed),
        agreement=agreement(made, reference),
        calibration_error=calibration_error(made),
        parameters=sum(entry.numel() for entry in variant.pytorch.model.parameters()),
        disk_bytes=variant.disk_bytes,
        peak_bytes=peak,
        latency=latency,
    )


def _decisions(variant: Variant, data: LabeledData, labeling: Labeling) -> Decisions:
    batches = (variant.batch(batch) for batch in data.batches(BATCH_SIZE))
    return collect_decisions(variant.runtime.logits, batches, labeling)


def _latencies(
    variants: Sequence[Variant], data: LabeledData, counts: Sequence[int], seconds: float
) -> list[tuple[Latency, ...]]:
    """Return the latencies of each variant for each number of samples, all variants in turns."""
    found: list[list[Latency]] = [[] for _ in variants]
    for count in counts:
        batch = data.first(count)
        calls = {str(place): entry.runtime.forward(entry.batch(batch)) for place, entry in enumerate(variants)}
        for place, times in interleaved_times(calls, seconds).items():
            found[int(place)].append(Latency(count, *map(float, np.percentile(times, (50, 95)))))
    return [tuple(entry) for entry in found]
