"""Where a step's time goes: its parts, timed one by one with the objects of the real trainers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hf_semckd.losses.logits import kd_loss

from .variants import Variant, synchronize

TEMPERATURE = 4.0


def measure_parts(
    variants: Mapping[str, Variant], batches: Sequence[Mapping[str, Tensor]], repeats: int, description: str
) -> dict[str, list[float]]:
    """Return the seconds of each part, `repeats` of them, the parts in turn.

    Args:
        variants: By name; a part whose variant is missing is left out.
        batches: Batches that every variant has seen.
        repeats: How often each part is timed, after one warm-up.
        description: Shown with the progress.
    """
    if not variants:
        return {}
    parts = _parts(variants, batches[0])
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    device = next(iter(variants.values())).device
    for repeat in tqdm(range(repeats + 1), desc=description, leave=False):
        for name, part in parts.items():
            part.prepare()
            value = timed(part.action, device)
            if repeat > 0:
                seconds[name].append(value)
    return seconds


def shares_of(seconds: Mapping[str, Sequence[float]], kd_step: float) -> dict[str, float]:
    """Return each part's median as a share of a KD step."""
    return {name: median(values) / kd_step for name, values in seconds.items()}


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that an action takes on a device."""
    synchronize(device)
    begin = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - begin


@dataclass(frozen=True)
class Part:
    """A part of a step: what is timed, and what must happen before, untimed."""

    action: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def _parts(variants: Mapping[str, Variant], batch: Mapping[str, Tensor]) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    if "ce" in variants:
        ce = variants["ce"]
        parts["student forward and backward"] = Part(lambda: ce.compute_gradients(batch), ce.model.zero_grad)
        parts["optimizer step, student"] = _optimizer_part(ce, batch)
    if "kd" in variants:
        teaching: Any = variants["kd"].trainer
        parts["teacher forward"] = Part(lambda: teaching.distillation.run_teacher(batch))
    if "semckd" in variants:
        parts.update(_distillation_parts(variants["semckd"], batch))
        parts["optimizer step, student and projections"] = _optimizer_part(variants["semckd"], batch)
    if "cached" in variants:
        reader: Any = variants["cached"].trainer
        parts["cache read"] = Part(lambda: reader.distillation.run_teacher(batch))
    return parts


def _distillation_parts(variant: Variant, batch: Mapping[str, Tensor]) -> dict[str, Part]:
    trainer: Any = variant.trainer
    loss = variant.feature_loss
    student, teacher, masks = _captured(variant, batch)
    logits = trainer.distillation.run_teacher(batch).logits
    # On CUDA the teacher has a stream of its own.
    synchronize(variant.device)
    own = torch.randn_like(logits).requires_grad_()

    def forget_gradients() -> None:
        variant.model.zero_grad()
        for tensor in (*student, own):
            tensor.grad = None
        loss.collecting = False  # statistics are a part of their own; every step of the trainer sets it again

    def compare_features() -> None:
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            total = loss(student, teacher, *masks).total
        total.backward()

    def update_statistics() -> None:
        loss.update_statistics(teacher)
        loss.synchronize()

    return {
        "teacher forward, with features": Part(lambda: trainer.distillation.run_teacher(batch)),
        "logits term": Part(lambda: kd_loss(own, logits, TEMPERATURE).mean().backward(), forget_gradients),
        "feature loss forward and backward": Part(compare_features, forget_gradients),
        "statistics": Part(update_statistics),
    }


def _optimizer_part(variant: Variant, batch: Mapping[str, Tensor]) -> Part:
    def prepare() -> None:
        variant.model.zero_grad()
        variant.compute_gradients(batch)

    return Part(variant.update, prepare)


def _captured(variant: Variant, batch: Mapping[str, Tensor]) -> tuple[list[Tensor], Any, Sequence[Any]]:
    """Return the student's features, what is kept of the teacher's, and the masks, as the loss gets them in a step."""
    seen: list[tuple[Any, ...]] = []
    handle = variant.feature_loss.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    try:
        variant.step(batch)
    finally:
        handle.remove()
    student, teacher, *masks = seen[0]
    leaves = [feature.detach().clone().requires_grad_() for feature in student]
    return leaves, teacher, masks
