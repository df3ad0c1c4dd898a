"""Teacher outputs as rows, one a sample, without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Behind the name of a stored tensor that was cut: it runs along all tokens of its sample, or along the chosen ones.
ALL_TOKENS, CHOSEN_TOKENS = "|all", "|chosen"
CHOSEN_KINDS = ("tokens", "positions", "mask")


def to_rows(
    outputs: Mapping[str, Tensor], lengths: Sequence[int] | None, width: int | None
) -> list[dict[str, Tensor]]:
    """Return each sample's tensors without padding; the names of those that were cut say so.

    Args:
        outputs: Tensors whose first dimension is the batch.
        lengths: Number of tokens of each sample, when padding follows them; None when nothing is known to be padding.
        width: Number of tokens of the padded samples.
    """
    masks = {value.shape[1]: value.sum(1).tolist() for name, value in outputs.items() if name.startswith("mask.")}
    sampled = {name.partition(".")[2] for name in outputs if name.startswith("positions.")}
    masked = {name.partition(".")[2] for name in outputs if name.startswith("mask.")}
    cuts: dict[str, tuple[str, Sequence[int] | None]] = {}
    for name, value in outputs.items():
        kind = name.partition(".")[0]
        along_all = lengths is not None and value.dim() > 1 and value.shape[1] == width
        cuts[name] = (name, None)
        if sampled and "." in name and kind in CHOSEN_KINDS:
            # The chosen ones come first. Beside layers without a mask widths would not tell which are cut.
            if sampled <= masked and value.shape[1] in masks:
                cuts[name] = (name + CHOSEN_TOKENS, masks[value.shape[1]])
        elif along_all and (value.dim() == 3 or kind == "mask"):
            cuts[name] = (name + ALL_TOKENS, lengths)
    samples = len(next(iter(outputs.values())))
    rows: list[dict[str, Tensor]] = [{} for _ in range(samples)]
    for name, (stored_name, ends) in cuts.items():
        for index, row in enumerate(rows):
            sample = outputs[name][index]
            row[stored_name] = sample if ends is None else sample[: ends[index]]
    return rows


def to_batch(rows: Sequence[Mapping[str, Tensor]], width: int | None) -> dict[str, Tensor]:
    """Return the rows' tensors stacked, by stored name, filled with zeros behind what was cut.

    Args:
        rows: Rows of one cache.
        width: Number of tokens of the padded samples of the batch.
    """
    if not rows:
        return {}
    stacked = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if not name.endswith((ALL_TOKENS, CHOSEN_TOKENS)):
            stacked[name] = torch.stack(values)
            continue
        length = width if name.endswith(ALL_TOKENS) and width is not None else max(len(value) for value in values)
        padded = values[0].new_zeros(len(values), length, *values[0].shape[1:])
        for index, value in enumerate(values):
            padded[index, : len(value)] = value
        stacked[name] = padded
    return stacked


def plain_names(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return stored tensors under the names that they had before they were cut."""
    return {name.partition("|")[0]: value for name, value in stored.items()}
