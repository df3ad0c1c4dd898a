"""Draws what losses are given: layers of every kind, features of every size and precision, and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from hf_semckd.features.layers import FeatureSpec

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What both models' layers are: `images` are maps or patches, each layer for itself.
KINDS = ("maps", "patches", "images", "text", "other tokenization", "vectors")
MASK_DTYPES = (torch.long, torch.bool, torch.float32)
# A feature loss takes long: the default suite tries it on fewer examples.
FEWER = settings(max_examples=5) if settings().max_examples < 100 else settings()
SMALLEST_EXPONENT, LARGEST_EXPONENT = -8, 4


def noise(*shape: int, seed: int) -> Tensor:
    """Return normally distributed numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _only(places: Any) -> Callable[[Tensor], Tensor]:
    """Return a function that makes all but some samples zero."""

    def change(rows: Tensor) -> Tensor:
        kept = torch.zeros_like(rows)
        kept[places] = rows[places]
        return kept

    return change


# Of features (B, ...) of size 1, those that losses may stumble over.
PATTERNS: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": lambda rows: rows,
    "zeros": torch.zeros_like,
    "constant": torch.ones_like,
    "equal samples": lambda rows: rows[:1].expand_as(rows).clone(),
    "nearly equal samples": lambda rows: rows[:1] + 1e-3 * rows,
    "one sample": _only(slice(0, 1)),
    "no first sample": _only(slice(1, None)),
    "offset": lambda rows: 1 + 1e-3 * rows,
    "outlier": lambda rows: torch.where(torch.arange(rows.shape[-1]) == 0, rows, 1e-3 * rows),
}


@dataclass(frozen=True)
class Batch:
    """What a feature loss is made for and given."""

    student_specs: Sequence[FeatureSpec]
    teacher_specs: Sequence[FeatureSpec]
    student: Sequence[Tensor]
    teacher: Sequence[Tensor]
    student_mask: Tensor | None
    teacher_mask: Tensor | None
    tokens_aligned: bool

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.student[0])

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of a loss."""
        return self.student, self.teacher, self.student_mask, self.teacher_mask

    def at(self, samples: Any) -> Batch:
        """Return some of the samples, by a slice or in an order."""
        student, teacher = ([feature[samples] for feature in features] for features in (self.student, self.teacher))
        masks = [None if mask is None else mask[samples] for mask in (self.student_mask, self.teacher_mask)]
        return replace(self, student=student, teacher=teacher, student_mask=masks[0], teacher_mask=masks[1])


@st.composite
def values(draw: Any, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Draw tensors of one precision, size and pattern."""
    change, seed = PATTERNS[draw(st.sampled_from(sorted(PATTERNS)))], draw(st.integers(0, 2**20))
    size = 10.0 ** draw(st.integers(SMALLEST_EXPONENT, LARGEST_EXPONENT))
    limit = torch.finfo(dtype).max
    rows = [change(noise(*shape, seed=seed + index)) * size for index, shape in enumerate(shapes)]
    return [entry.clamp(-limit, limit).to(dtype) for entry in rows]


@st.composite
def masks(draw: Any, samples: int, length: int, always: bool = False) -> Tensor | None:
    """Draw a mask (B, N), all ones and all zeros included, or None."""
    if not always and not draw(st.booleans()):
        return None
    rows = draw(st.lists(st.integers(0, 2**length - 1), min_size=samples, max_size=samples))
    counted = torch.tensor([[row >> place & 1 for place in range(length)] for row in rows])
    return counted.to(draw(st.sampled_from(MASK_DTYPES)))


@st.composite
def specs(draw: Any, kind: str, role: str, count: int, length: int, layout: tuple[int, int, int]) -> list[FeatureSpec]:
    """Draw so many layers of a kind; tokens have a length, patches a (prefix, height, width)."""
    found = []
    for index in range(count):
        name, channels = f"{role} {index}", draw(st.integers(1, 6))
        here = draw(st.sampled_from(["maps", "patches"])) if kind == "images" else kind
        if here == "maps":
            shape = channels, draw(st.integers(1, 4)), draw(st.integers(1, 4))
            found.append(FeatureSpec.from_shape(shape, name))
        elif here == "patches":
            prefix, height, width = layout
            found.append(FeatureSpec(name, "tokens", channels, prefix + height * width, (height, width), prefix))
        else:
            found.append(FeatureSpec(name, "tokens", channels, 1 if kind == "vectors" else length))
    return found


def shape_of(spec: FeatureSpec, samples: int, kind: str) -> tuple[int, ...]:
    """Return the shape of a layer's features."""
    if spec.kind == "map":
        assert spec.grid is not None
        return samples, spec.channels, *spec.grid
    return (samples, spec.channels) if kind == "vectors" else (samples, spec.length, spec.channels)


@st.composite
def batches(
    draw: Any,
    kinds: Sequence[str] = KINDS,
    counts: Sequence[int] = (1, 2, 3),
    dtypes: Sequence[torch.dtype] = DTYPES,
    always_masked: bool = False,
) -> Batch:
    """Draw a batch for a feature loss.

    Args:
        kinds: What the layers may be, see `KINDS`.
        counts: How many layers either model may have.
        dtypes: Precisions of either model's features.
        always_masked: Whether tokens have masks in any case.
    """
    kind, samples = draw(st.sampled_from(kinds)), draw(st.integers(1, 4))
    lengths = [draw(st.integers(1, 6))] * 2
    layouts = [(draw(st.integers(0, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3)))] * 2
    if kind == "other tokenization":
        lengths[1] = draw(st.integers(1, 6))
    elif draw(st.booleans()):
        layouts[1] = (draw(st.integers(0, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    roles = [("student", *pair) for pair in zip(lengths[:1], layouts[:1], strict=True)]
    roles += [("teacher", *pair) for pair in zip(lengths[1:], layouts[1:], strict=True)]
    layers = [draw(specs(kind, role, draw(st.sampled_from(counts)), *sizes)) for role, *sizes in roles]
    features = [
        draw(values([shape_of(spec, samples, kind) for spec in own], draw(st.sampled_from(dtypes)))) for own in layers
    ]
    masked = kind in ("text", "other tokenization")
    found = [draw(masks(samples, length, always_masked)) if masked else None for length in lengths]
    if kind == "text" and draw(st.booleans()):
        found[1] = found[0]
    return Batch(*layers, *features, *found, tokens_aligned=kind != "other tokenization")
