"""Packed rows: documents one after the other, told apart by positions that start again. Each document is a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.columns import IGNORED
from ..errors import InputError
from .outputs import first_tensor

# Outputs that differ by a smaller share are the same, by the bits of their precision: nothing should be added up anew.
ROUNDING = {16: 5e-3, 32: 1e-5, 64: 1e-10}
# Of the documents that a model is tried on.
LONGEST = 16


def document_starts(batch: Mapping[str, Any]) -> Tensor | None:
    """Return which tokens (B, N) begin a document; None for a batch that is padded, or tells no positions.

    As transformers does (`masking_utils.find_packed_sequence_indices`): where a position is not one more than the one
    before.
    """
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or batch.get("attention_mask") is not None:
        return None
    return F.pad(positions.diff(dim=1) != 1, (1, 0), value=True)


def document_count(batch: Mapping[str, Any]) -> Tensor | None:
    """Return the number of documents in packed rows, a scalar on the device; None for other batches."""
    starts = document_starts(batch)
    return None if starts is None else (starts & ~_filling(batch, starts)).sum()


def _filling(batch: Mapping[str, Any], starts: Tensor) -> Tensor:
    """Return which tokens (B, N) only fill up packed rows: documents of one token without a label, at their ends."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.shape != starts.shape:
        return torch.zeros_like(starts)
    alone = starts & F.pad(starts[:, 1:], (0, 1), value=True) & (labels == IGNORED)
    # Two in a row at least, up to the end: a text of one word is a document.
    tail = alone.flip(1).long().cumprod(1).flip(1).bool()
    return tail & (tail.sum(1, keepdim=True) > 1)


@dataclass(frozen=True)
class Documents:
    """The D documents of packed rows, of at most L tokens: `index` (D, L) into the flattened rows, and their mask."""

    index: Tensor
    mask: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Documents | None:
        """Return the documents of a batch, None where every row is one; a host sync for packed rows alone."""
        starts = document_starts(batch)
        if starts is None:
            return None
        places = starts.flatten().nonzero().flatten()
        if len(places) == len(starts):
            return None
        lengths = F.pad(places, (0, 1), value=starts.numel()).diff()
        kept = ~_filling(batch, starts).flatten()[places]
        places, lengths = places[kept].unsqueeze(1), lengths[kept].unsqueeze(1)
        offsets = torch.arange(int(lengths.max()), device=places.device)
        index = (places + offsets).clamp(max=starts.numel() - 1)
        return cls(index, offsets < lengths)

    def unpack(self, rows: Tensor) -> Tensor:
        """Return the tokens (D, L, ...) of packed rows (B, N, ...); what the mask leaves out is anybody's."""
        return rows.flatten(0, 1)[self.index]


@torch.no_grad()
def check_documents(model: nn.Module, batch: Mapping[str, Any], inputs: Mapping[str, Any], role: str) -> None:
    """Refuse packed rows for a model (`role`, in evaluation mode) that does not keep their documents apart.

    Two documents are made of the batch's first tokens, and the first one is changed: what the model says of the second
    must stay the same. `inputs` are those that it takes of the batch.
    """
    ids = inputs.get("input_ids")
    if document_starts(batch) is None or not isinstance(ids, Tensor) or ids.numel() < 4:
        return
    length = min(ids.numel() // 2, LONGEST)
    words = ids.flatten()[: 2 * length].view(1, -1)
    changed = torch.cat([words[:, :length].flip(1), words[:, length:]], 1)
    changed[:, 0] = words[:, -1]
    positions = torch.arange(length, device=ids.device).repeat(2).view(1, -1)
    told: dict[str, Any] = {"position_ids": positions} if "position_ids" in inputs else {}
    if inputs.get("use_cache") is False:
        told["use_cache"] = False
    outputs = [first_tensor(model(**told, input_ids=tokens)) for tokens in (words, changed)]
    if any(output is None or output.dim() != 3 for output in outputs):
        return
    before, after = (output[:, length:].float() for output in outputs if output is not None)
    rounding = ROUNDING[torch.finfo(next(model.parameters()).dtype).bits]
    if (before - after).norm() <= rounding * before.norm():
        return
    raise InputError(
        f"The {role} reads across the documents of packed rows",
        received=f"position_ids that start again, and {type(model).__name__}, whose outputs for one document depend "
        "on the one before",
        expected="a model that keeps them apart, as causal language models with position_ids do",
        todo="pad instead of packing (DataCollatorWithPadding), set use_cache=False, or choose another model or "
        "attn_implementation",
    )
