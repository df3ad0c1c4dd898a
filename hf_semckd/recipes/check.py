"""Before a training: is the teacher right about the data at all?"""

from __future__ import annotations

from collections import Counter

from ..evaluation.decisions import Kind, Labeling
from ..evaluation.examples import compare_predictions
from ..evaluation.metrics import find_metric
from .progress import Voice
from .rows import Rows
from .training import Prepared

SAMPLES = 256
# A teacher has learned something if it beats the most frequent class by more than this.
MARGIN = 0.02


def check_teacher(prepared: Prepared, batch_size: int, voice: Voice) -> None:
    """Print how good the teacher is, and the student before its training; warn of a teacher that knows nothing.

    Wrong columns, or classes in another order, show in nothing else: a student learns from such a teacher, too.
    """
    samples = prepared.samples
    count = min(SAMPLES, len(samples.splits.validation))
    found = compare_predictions(
        prepared.student,
        prepared.teachers,
        samples.splits.validation,
        weights=[1 / len(prepared.teachers)] * len(prepared.teachers),
        processing_class=samples.processor,
        data_collator=samples.collator,
        batch_size=batch_size,
        samples=count,
    )
    quality = found.quality
    told = (
        f"{found.metric} {quality['teacher']:.4g} on {count} samples; student before training {quality['student']:.4g}"
    )
    voice("", f"teacher {told}")
    most = _most_frequent(prepared.rows)
    if found.metric == "accuracy" and most is not None and quality["teacher"] <= most + MARGIN:
        voice(
            "warning",
            f"the teacher is no better than the most frequent class ({most:.0%}), and students imitate it: check the "
            "columns, class_names and max_length, or fine-tune it longer (teacher_epochs, teacher_learning_rate)",
        )


def check_metric(name: str | None, rows: Rows) -> None:
    """Raise `ConfigurationError` for a metric that is not known, or of another task; before hours of training."""
    kinds: dict[str, Kind] = {"single": "classes", "multi": "multi_label", "regression": "regression"}
    spans = rows.kind.name == "question-answering"
    kind: Kind = kinds[rows.classes.kind] if rows.classes is not None else "spans" if spans else "words"
    find_metric(name, Labeling(kind))


def _most_frequent(rows: Rows) -> float | None:
    """Return the share of the most frequent class; None where samples have not one class each."""
    if rows.classes is None or rows.classes.kind != "single" or rows.kind.labels_tokens:
        return None
    counts = Counter(rows.splits.validation[rows.columns.label])
    return max(counts.values()) / sum(counts.values())
