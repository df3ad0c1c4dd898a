"""What a model's own loss is averaged over, where that is not every label that is not -100."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES

from ..data.columns import IGNORED, IGNORED_PIXEL
from .inputs import FAILURES, InputSelector
from .outputs import base_model, detects_objects, device_of
from .tasks import SAME_LOSS, Task

# The columns of the first and the last token of an answer.
ENDS = ("start_positions", "end_positions")
# Columns that hold a list, an entry a picture, have losses of their own kind: of boxes, or of masks.
LISTED = ("labels", "class_labels", "mask_labels")
# What models of pixels call the label that does not count.
PIXEL_FIELDS = ("semantic_loss_ignore_index", "loss_ignore_index")


@dataclass(frozen=True)
class OwnLoss:
    """How the loss that a student computes comes about, for its share of an optimizer step to be exact.

    Attributes:
        ignored: Labels that do not count: of pixels two, where nothing says which one the loss knows.
        field: The field of the configuration that says so, where there is one.
        adds: Whether it is a sum over samples in place of a mean (CTC with `ctc_loss_reduction="sum"`).
        finds_ends: Whether it is the mean of two: of where answers start, and of where they end, each over the answers
            inside the text.
        divisible: Whether it follows from the losses of parts of a batch at all.
    """

    ignored: tuple[int, ...] = (IGNORED,)
    field: str | None = None
    adds: bool = False
    finds_ends: bool = False
    divisible: bool = True


DEFAULT_LOSS = OwnLoss()


def find_own_loss(
    model: nn.Module, outputs: Any, logits: Tensor | None, batch: Mapping[str, Any], task: Task
) -> OwnLoss:
    """Return how the loss of a model in evaluation mode comes about, by what it gave for a batch."""
    base: Any = base_model(model)
    settings = getattr(base, "config", None)
    if detects_objects(outputs) or any(isinstance(batch.get(name), (list, tuple)) for name in LISTED):
        return OwnLoss(divisible=False)
    if task == "frames":
        recognizes = any(kind.__name__ in MODEL_FOR_CTC_MAPPING_NAMES.values() for kind in type(base).__mro__)
        return OwnLoss(adds=recognizes and getattr(settings, "ctc_loss_reduction", None) == "sum")
    if task == "spans":
        return OwnLoss(finds_ends=_finds_ends(model, batch))
    if logits is not None and logits.dim() == 4:
        field = next((name for name in PIXEL_FIELDS if isinstance(getattr(settings, name, None), int)), None)
        if field is None:
            return OwnLoss((IGNORED, IGNORED_PIXEL) if logits.shape[1] <= IGNORED_PIXEL else (IGNORED,))
        # One logit a pixel (SegFormer) is judged at those without a label too, at which the loss is 0.
        return OwnLoss(() if logits.shape[1] == 1 else (getattr(settings, field),), field)
    return DEFAULT_LOSS


def ends_loss(outputs: Any, batch: Mapping[str, Any], totals: Tensor) -> Tensor:
    """Return the loss of where answers start and end (`ENDS`), each summed and divided by its total (2).

    As transformers has it, positions before the text are its first, and those after it do not count.
    """
    shares = []
    for logits, name, total in zip((outputs.start_logits, outputs.end_logits), ENDS, totals, strict=True):
        length = logits.shape[1]
        targets = batch[name].to(logits.device, torch.int64, non_blocking=True).flatten().clamp(0, length)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        summed = F.cross_entropy(wide, targets, ignore_index=length, reduction="sum")
        shares.append(summed / total.clamp(min=1).to(summed))
    return (shares[0] + shares[1]) / 2


def count_ends(batch: Mapping[str, Any]) -> Tensor:
    """Return how many answers of a batch start, and how many end, inside its texts (2); none where it tells none."""
    if not has_ends(batch):
        return torch.zeros(2, dtype=torch.int64, device=device_of(batch.values()))
    length = batch["input_ids"].shape[1]
    return torch.stack([(batch[name] < length).sum() for name in ENDS])


def has_ends(batch: Mapping[str, Any]) -> bool:
    """Whether a batch holds texts, and where an answer starts and ends in each."""
    return all(isinstance(batch.get(name), Tensor) for name in ("input_ids", *ENDS))


def _finds_ends(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether a model's loss is that of `ends_loss`, tried on answers of which one starts after its text."""
    if not has_ends(batch) or batch["input_ids"].dim() != 2:
        return False
    rows, length = batch["input_ids"].shape
    places = torch.arange(rows, device=batch["input_ids"].device)
    tried = {**batch, ENDS[0]: (places % length).where(places != rows - 1, length if rows > 1 else 0)}
    tried[ENDS[1]] = torch.full_like(places, length - 1)
    with suppress(*FAILURES, KeyError):
        outputs: Any = model(**InputSelector(model)(tried))
        if outputs.start_logits.shape[1] == length:
            expected = float(ends_loss(outputs, tried, count_ends(tried)))
            return abs(float(outputs["loss"]) - expected) <= SAME_LOSS * max(abs(expected), 1e-6)
    return False
