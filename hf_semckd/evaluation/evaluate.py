"""Models side by side on the same data: quality, the share of it that is kept, size, memory and latency."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.samples import is_map_style
from ..data.views import preserved_random_state
from ..errors import ConfigurationError, InputError
from ..models.inputs import evaluating
from ..models.latency import interleaved_times
from ..models.loading import ModelSource, load_model
from ..models.sizes import count_parameters
from ..publishing.facts import environment
from ..publishing.rows import Latency, Row
from .decisions import DecisionCollector, Decisions, Labeling, find_labeling, labels_of
from .export import check_installed
from .metrics import Metric, agreement, calibration_error, find_metric, resample, share_kept
from .table import Evaluation
from .variants import LabeledData, Variant, make_variants, usual_collator

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
    batch_size: int = 32,
    latency_batches: Sequence[int] = LATENCY_BATCHES,
    seconds: float = 1.0,
    seed: int = 0,
) -> Evaluation:
    """Evaluate models on the same labeled data, and measure what they cost on this machine.

    The first model is the reference, usually the teacher. Labels are numbered as by the last one's `id2label`.
    Latencies are those of the forward pass, on the CPU and on a GPU if there is one, all models in turns.

    Args:
        models: Name in the table: model, name or folder.
        dataset: Map-style, prepared and labeled as for `Trainer.evaluate`; columns `teacher_*` are the reference's.
        processing_class: The tokenizer that pads the samples, if `data_collator` does not.
        metric: A name, or another that `metrics.find_metric` takes. None: the usual one of the task.
        onnx: Whether to measure ONNX files too, in float32 and with int8 weights. None: where that is possible.
        memory: Whether to measure peak memory, which starts a process for each row.
        batch_size, latency_batches: Samples in a batch of the evaluation, and in those for which times are measured.
        seconds: Time for which the slowest model is measured.
        seed: Of the bootstrap, and of a data set or collator that draws at random.

    Raises `InputError` for data without labels, or models that do not fit to them.

    Example:
        >>> print(evaluate({"teacher": teacher, "student": student}, test_data))  # doctest: +SKIP
    """
    _check(models, dataset, onnx, (batch_size, *latency_batches))
    loaded = {name: load_model(model, f"model {name!r}") for name, model in models.items()}
    data = LabeledData(dataset, data_collator or usual_collator(processing_class), tuple(loaded.values()))
    with tempfile.TemporaryDirectory() as folder, evaluating(*loaded.values()), preserved_random_state(seed):
        variants, notes = make_variants(loaded, data, Path(folder), onnx)
        decided, chosen = _decide(variants, data, metric, batch_size)
        timed = {count: data.first(count) for count in latency_batches}
        latencies = _latencies(variants, timed, seconds)
        peaks = [variant.peak(timed[max(timed)]) if memory else None for variant in variants]
        shapes = {count: data.shapes(batch) for count, batch in timed.items()}
    qualities = [resample(chosen, made, seed) for made in decided]
    measured = zip(variants, decided, qualities, latencies, peaks, strict=True)
    rows = tuple(_row(chosen, (decided[0], qualities[0]), *entry) for entry in measured)
    named = chosen.name, chosen.higher_is_better
    return Evaluation(rows, *named, decided[0].count, shapes, environment(), tuple(notes))


def _check(models: Any, dataset: Any, onnx: bool | None, counts: tuple[int, ...]) -> None:
    if isinstance(dataset, Mapping) or not is_map_style(dataset):
        splits = f" of {', '.join(map(str, dataset))}" if isinstance(dataset, Mapping) else ""
        raise InputError(
            "This data set has no samples with an index",
            received=f"a {type(dataset).__name__}{splits}",
            expected="a map-style data set, such as one split of a datasets.Dataset",
            todo="pass one split, such as data['test'], loaded without streaming",
        )
    if not isinstance(models, Mapping) or not models or not len(dataset):
        raise InputError(
            "There is nothing to evaluate",
            received=f"models={models!r}, and {len(dataset)} samples",
            expected="at least one of each",
            todo="pass {name: model}, and labeled samples",
        )
    if len(counts) < 2 or any(type(count) is not int or count < 1 for count in counts):
        raise ConfigurationError(
            "Batches have at least one sample",
            received=f"batch_size={counts[0]!r}, latency_batches={counts[1:]!r}",
            expected="an int of at least 1, and one or more of them",
            todo="leave them out: 32, and (1, 32)",
        )
    if onnx:
        check_installed()


def _decide(
    variants: Sequence[Variant], data: LabeledData, metric: Any, batch_size: int
) -> tuple[list[Decisions], Metric]:
    """Return what every variant decides, and the metric; every batch is drawn once for all of them."""
    first = data.first(2)
    labelings: dict[str, Labeling] = {}
    for variant in variants:
        if variant.model not in labelings:
            labelings[variant.model] = find_labeling(variant.pytorch.model, variant.batch(first))
    if len({labeling.kind for labeling in labelings.values()}) > 1:
        raise InputError(
            "These models have different tasks",
            received=", ".join(f"{name}: {labeling.kind}" for name, labeling in labelings.items()),
            expected="models whose predictions mean the same",
            todo="evaluate them one by one",
        )
    chosen = find_metric(metric, labelings[variants[0].model])
    collectors = [DecisionCollector(labelings[variant.model], f"model {variant.model!r}") for variant in variants]
    for batch in data.batches(batch_size):
        for variant, collector in zip(variants, collectors, strict=True):
            collector.add(variant.logits(batch), labels_of(batch))
    return [collector.decisions() for collector in collectors], chosen


def _row(
    metric: Metric,
    reference: tuple[Decisions, np.ndarray],
    variant: Variant,
    made: Decisions,
    quality: np.ndarray,
    latency: tuple[Latency, ...],
    peak: int | None,
) -> Row:
    return Row(
        model=variant.model,
        runtime=variant.runtime.name,
        device=variant.runtime.device,
        quality=float(quality[0]),
        kept=share_kept(metric, quality, reference[1]),
        agreement=agreement(made, reference[0]),
        calibration_error=calibration_error(made),
        parameters=count_parameters(variant.pytorch.model),
        disk_bytes=variant.disk_bytes,
        peak_bytes=peak,
        latency=latency,
    )


def _latencies(
    variants: Sequence[Variant], batches: Mapping[int, Mapping[str, Any]], seconds: float
) -> list[tuple[Latency, ...]]:
    """Return the latencies of each variant for each number of samples, all variants in turns."""
    found: list[list[Latency]] = [[] for _ in variants]
    for count, batch in batches.items():
        calls = {str(place): entry.runtime.forward(entry.batch(batch)) for place, entry in enumerate(variants)}
        for place, times in interleaved_times(calls, seconds).items():
            found[int(place)].append(Latency(count, *map(float, np.percentile(times, (50, 95)))))
    return [tuple(entry) for entry in found]
