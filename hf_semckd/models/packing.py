"""Packed rows: documents one behind the other, told apart by positions that start again. Each document is a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .outputs import accepts, first_tensor

# Outputs that differ by fewer units of rounding are the same.
SAME = 32


def document_starts(batch: Mapping[str, Any]) -> Tensor | None:
    """Return which tokens (B, N) begin a document; None for a batch that is padded, or tells no positions.

    As transformers does (`masking_utils.find_packed_sequence_indices`): where a position is not one more than the one
    before.
    """
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or batch.get("attention_mask") is not None:
        return None
    return F.pad(positions.diff(dim=1) != 1, (1, 0), value=True)


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
        lengths = F.pad(places, (0, 1), value=starts.numel()).diff().unsqueeze(1)
        offsets = torch.arange(int(lengths.max()), device=places.device)
        index = (places.unsqueeze(1) + offsets).clamp(max=starts.numel() - 1)
        return cls(index, offsets < lengths)

    def unpack(self, rows: Tensor) -> Tensor:
        """Return the tokens (D, L, ...) of packed rows (B, N, ...); what the mask leaves out is anybody's."""
        return rows.flatten(0, 1)[self.index]


@torch.no_grad()
def check_documents(model: nn.Module, inputs: Mapping[str, Any], role: str) -> None:
    """Refuse packed rows for a model (`role`, in evaluation mode) that does not keep their documents apart."""
    documents = Documents.of(inputs)
    if documents is None:
        return
    ids = inputs["input_ids"]
    changed = ids.flatten().clone()
    first = documents.index[0][documents.mask[0]]
    changed[first] = ids.flatten()[first].flip(0)
    # As in training: with a cache of keys, transformers does not look at the positions.
    plain = {"use_cache": False} if accepts(model.forward, "use_cache") else {}
    outputs = (first_tensor(model(**{**inputs, **plain, "input_ids": x})) for x in (ids, changed.view_as(ids)))
    before, after = (documents.unpack(x)[1:] if x is not None and x.dim() == 3 else None for x in outputs)
    if before is None or after is None:
        return
    rounding = SAME * torch.finfo(before.dtype).eps * before.abs().max()
    if (before - after).abs().max() <= rounding:
        return
    raise InputError(
        f"The {role} reads across the documents of packed rows",
        received=f"position_ids that start again, and {type(model).__name__}, whose outputs for one document depend "
        "on the one before",
        expected="a model that keeps them apart, as causal language models with position_ids do",
        todo="pad instead of packing (DataCollatorWithPadding), or choose another model or attn_implementation",
    )
