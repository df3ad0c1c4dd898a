"""How the feature loss's own time grows with each size: the slope of log time over log size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from hf_semckd import SemCKDConfig
from hf_semckd.features.layers import FeatureSpec
from hf_semckd.losses import SemCKDLoss
from hf_semckd.training.options import loss_options

from .parts import timed

FORMS = ("default", "published")


@dataclass(frozen=True)
class Sizes:
    """What the feature loss's time depends on; the student is half as wide as the teacher."""

    student_layers: int = 4
    teacher_layers: int = 8
    batch: int = 16
    length: int = 128
    width: int = 256

    def shapes(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Return the shapes of the student's and the teacher's features, without the batch."""
        student = [(self.length, self.width // 2)] * self.student_layers
        return student, [(self.length, self.width)] * self.teacher_layers


# The published form is many times dearer, so it is measured smaller.
BASE = {"default": Sizes(), "published": Sizes(2, 4, 8, 32, 64)}
TINY = Sizes(2, 2, 4, 8, 16)
FACTORS = (1, 2, 4)
AXES = tuple(Sizes.__dataclass_fields__)


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the exponent p of seconds = c * size ** p, by least squares over the logarithms."""
    return float(stats.linregress(np.log(sizes), np.log(seconds)).slope)


def measure_growth(form: str, device: str, repeats: int, tiny: bool = False) -> dict[str, Any]:
    """Return, for each axis, the sizes, all seconds at each size, and the exponent over the medians.

    Args:
        form: One of `FORMS`.
        device: `cpu` or `cuda`.
        repeats: How often each size is timed; the sizes of an axis in turn.
        tiny: Whether to start from sizes that only try the measurement out.
    """
    base = TINY if tiny else BASE[form]
    return {axis: _measure_axis(axis, base, form, device, repeats) for axis in AXES}


def _measure_axis(axis: str, base: Sizes, form: str, device: str, repeats: int) -> dict[str, Any]:
    values = [getattr(base, axis) * factor for factor in FACTORS]
    actions = {value: _action(replace(base, **{axis: value}), form, device) for value in values}
    seconds: dict[int, list[float]] = {value: [] for value in values}
    for repeat in tqdm(range(repeats + 2), desc=f"growth of {form} with {axis}", leave=False):
        for value, action in actions.items():
            taken = timed(action, torch.device(device))
            if repeat > 1:
                seconds[value].append(taken)
    medians = [median(seconds[value]) for value in values]
    return {"sizes": values, "seconds": list(seconds.values()), "exponent": slope(values, medians)}


def _action(sizes: Sizes, form: str, device: str) -> Callable[[], object]:
    """Return the loss's forward and backward on random features, configured as in a trainer."""
    torch.manual_seed(0)
    student_shapes, teacher_shapes = sizes.shapes()
    make = SemCKDConfig.published if form == "published" else SemCKDConfig
    config = make(output_dir="unused", per_device_train_batch_size=sizes.batch)
    specs = [
        [FeatureSpec.from_shape(shape, str(index)) for index, shape in enumerate(shapes)] for shapes in sizes.shapes()
    ]
    loss = SemCKDLoss.for_layers(*specs, loss_options(config)).to(device).train()
    student = [torch.randn(sizes.batch, *shape, device=device, requires_grad=True) for shape in student_shapes]
    teacher = [torch.randn(sizes.batch, *shape, device=device) for shape in teacher_shapes]

    def run() -> None:
        loss.zero_grad()
        for feature in student:
            feature.grad = None
        loss(student, teacher).total.backward()

    return run


def growth_rows(growth: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return one line a form: its exponents.

    Args:
        growth: By form: {"axes": what `measure_growth` returned}.
    """
    return [
        {
            "form": form,
            **{axis.replace("_", " "): f"{entry['exponent']:.2f}" for axis, entry in record["axes"].items()},
        }
        for form, record in growth.items()
    ]
