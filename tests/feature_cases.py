"""What every feature loss must do with whatever it is given, and the layers that each method is for."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import torch
from drawn import DTYPES, KINDS, Batch, batches
from hypothesis import assume
from hypothesis import strategies as st

from hf_semckd.choices import Association, ProjectionInit, Projector, TargetNorm
from hf_semckd.errors import ConfigurationError
from hf_semckd.losses import FEATURE_LOSSES
from hf_semckd.losses.base import FeatureLoss, LossOptions
from hf_semckd.losses.registry import make_feature_loss
from hf_semckd.losses.relations import CRDLoss

NAMES = [*FEATURE_LOSSES, "semckd+crd"]
# What a method is for, where it is not for everything.
METHOD_KINDS = {"simkd": ("maps",), "pkd": ("patches", "text", "other tokenization"), "minilm": ("patches", "text")}
METHOD_COUNTS = {"minilm": (3,), "pkd": (2, 3)}
# Losses of each sample by itself, however a batch is cut.
ALONE = ("fitnet", "at", "vid", "simkd", "pkd", "minilm", "layer_map")


def one_of(choices: Any) -> st.SearchStrategy[Any]:
    """Draw one of a setting's choices, or None where the models decide."""
    return st.sampled_from([None, *choices.__args__])


def options(samples: int) -> st.SearchStrategy[LossOptions]:
    """Draw settings of SemCKD."""
    return st.builds(
        LossOptions,
        association=one_of(Association),
        association_temperature=st.sampled_from([None, 1e-3, 0.2, 50.0]),
        target_norm=st.sampled_from(TargetNorm.__args__),
        projector=one_of(Projector),
        projection_init=one_of(ProjectionInit),
        relation_weight=st.sampled_from([None, 0.0, 20.0]),
        association_bank=st.sampled_from([0, 3]),
        max_tokens=st.sampled_from([0, 1, 2, 16]),
        max_grid=st.sampled_from([None, 0, 1, 2]),
        batch_size=st.just(samples),
        spares_last_layer=st.booleans(),
    )


def batches_for(
    name: str, dtypes: Any = DTYPES, kinds: Any = KINDS, always_masked: bool = False
) -> st.SearchStrategy[Batch]:
    """Draw batches of the kinds of layers that a method is for."""
    allowed = [kind for kind in METHOD_KINDS.get(name, KINDS) if kind in kinds]
    return batches(allowed, METHOD_COUNTS.get(name, (1, 2, 3)), dtypes, always_masked)


def loss_for(name: str, batch: Batch, chosen: LossOptions = LossOptions()) -> FeatureLoss:  # noqa: B008
    """Return the loss of a name for a batch; one that is not for its layers is no example."""
    torch.manual_seed(0)
    layers, known = (batch.student_specs, batch.teacher_specs), {"tokens_aligned": batch.tokens_aligned}
    if name == "crd":  # a ring of 16,384 would take most of the time
        return CRDLoss(*layers, negatives=8, embedding_size=4, **known)
    try:
        return make_feature_loss(name, *layers, chosen, **known)
    except ConfigurationError:
        assume(False)
        raise


def assert_sound(loss: FeatureLoss, batch: Batch, autocast: torch.dtype | None = None) -> None:
    """Check that a batch gives finite losses and gradients, as many as there are samples, and settings for JSON."""
    student = [feature.clone().requires_grad_() for feature in batch.student]
    with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
        out = loss(student, batch.teacher, batch.student_mask, batch.teacher_mask)
    assert out.per_sample.shape == (batch.size,) and out.per_sample.dtype in (torch.float32, torch.float64)
    assert out.total.isfinite() and out.per_sample.isfinite().all()
    if out.association is not None:
        torch.testing.assert_close(out.association.sum(2).max().item(), 1.0, rtol=1e-3, atol=1e-3)
        assert (out.association >= 0).all() and not out.errors.isinf().any()
    if out.total.requires_grad:
        out.total.backward()
    for tensor in (*student, *loss.parameters()):
        if tensor.grad is not None and not tensor.grad.isfinite().all():
            assert _beyond_float16(loss, batch), "a gradient that could be represented is not finite"
    json.dumps(loss.settings, allow_nan=False)


def _beyond_float16(loss: FeatureLoss, batch: Batch) -> bool:
    """Whether features are in float16, and their gradient in float32 is too large for that."""
    if batch.student[0].dtype != torch.float16:
        return False
    student = [feature.float().requires_grad_() for feature in batch.student]
    loss(student, *batch.arguments[1:]).total.backward()
    gradients = [feature.grad for feature in student if feature.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    return max(float(gradient.abs().max()) for gradient in gradients) > torch.finfo(torch.float16).max / 2
