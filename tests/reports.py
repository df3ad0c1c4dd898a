"""Reports made of plain values: small ones, and one full of what could break a page."""

from dataclasses import replace

from hf_semckd.publishing.report.parts import (
    AssociationHistory,
    AssociationMap,
    Bin,
    Comparison,
    Curve,
    DeployTable,
    Example,
    LayerError,
    Reliability,
    Run,
    UsedSetting,
)
from hf_semckd.publishing.report.report import DistillationReport
from hf_semckd.publishing.rows import Latency, Row, Share

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5Er"
    "kJggg=="
)
HOSTILE = "<script>alert('x')</script>\"'&{{ 7*7 }} \u202e\u05e9\u05dc\u05d5\u05dd\u202c 🎬 " + "long" * 80


def row(model, quality, kept, parameters, ms):
    times = (Latency(1, ms, 1.2 * ms), Latency(32, 20 * ms, 22 * ms))
    return Row(model, "PyTorch", "cpu", quality, Share(*kept), 0.9, 0.02, parameters, 4_000_000, None, times)


def deploy():
    rows = row("teacher", 0.92, (1.0, 1.0, 1.0), 1000, 6.2), row("student", 0.895, (0.973, 0.961, 0.985), 310, 2.0)
    return DeployTable(rows, "accuracy", True, 500, ("Not measured as ONNX files.",))


def association(students=("1", "2"), teachers=("1", "2", "3"), entropy=(1.0, 0.9)):
    weights = tuple(tuple(1 / len(teachers) for _ in teachers) for _ in students)
    maps = tuple(AssociationMap(10 * n + 1, 10 * n + 10, weights) for n in range(4))
    return AssociationHistory(tuple(students), tuple(teachers), maps, Curve("association/entropy", (1, 40), entropy))


def whole(text="plain"):
    """Return a report with every part, in which all free texts are `text`."""
    example = Example(3, 0.4, text, text, text, 0.9, 0.8, text, PIXEL)
    bins = (Bin(10, 0.6, 0.5), Bin(200, 0.97, 0.95))
    quality = {"teacher": 0.92, "student": 0.9}
    reliability = (Reliability("teacher", 0.02, bins), Reliability("student", 0.03, bins))
    made = replace(deploy(), rows=(replace(deploy().rows[0], model=text), *deploy().rows[1:]))
    names = (f"{text}.1", f"{text}.2"), tuple(f"{text}.{n}" for n in range(12))
    return DistillationReport(
        Run(text, text, text, (UsedSetting(text, text, text),), {text: text}, {text: text}, text),
        made,
        (
            Curve("loss", (1, 2, 40), (3.0, 2.0, 1.0)),
            Curve("task_loss", (1, 40), (1.0, 0.5)),
            Curve("eval_loss", (40,), (0.6,)),
        ),
        association(*names, entropy=(2.4, 2.0)),
        (LayerError(f"{text}.1", 1.0, 0.5), LayerError(f"{text}.2", 0.8, 0.9)),
        Comparison(500, text, quality, 0.93, text, reliability, (example,) * 3),
        {"comparison": text},
    )
