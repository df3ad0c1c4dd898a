"""Teacher outputs as rows of named tensors, one row a sample, without padding; and back.

A name is `logits`, or those in `draws.py`, `mask`, or `LAYER.KIND` (`2.mean`). Tokens also name the layer that holds
their choice (`2.tokens.0`, chosen by `0.positions` and `0.mask`), and targets of joined losses begin with their number
(`1/mask`).
Where a tensor was cut, the name says along what: `|all` tokens of its sample, or its `|chosen` ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import InputError
from ...features.targets import LAYER_TENSORS, LayerTarget, TeacherTargets, TokenChoice
from ...losses.sampled_logits import TokenSampling
from ..outputs import TeacherOutputs
from .draws import DRAWN, ENTROPY, are_draws, draw, drawn_logits
from .shard import Row

LOGITS = "logits"
ALL_TOKENS, CHOSEN_TOKENS = "|all", "|chosen"
CHOICE_TENSORS = ("positions", "mask")


class Piece(NamedTuple):
    """A tensor (B, ...) of the outputs, and its name in a row.

    Its second dimension runs `along` one of the endings above, or neither; `chosen` (B, K) masks the chosen tokens.
    """

    name: str
    value: Tensor
    along: str = ""
    chosen: Tensor | None = None


@dataclass(frozen=True)
class RowCheck:
    """What the stored rows of a teacher must look like; what does not is damage, and never stacked.

    Attributes:
        logits: Whether rows hold logits, whole.
        classes: The size of their classes or words; None where they are single numbers.
        channels: Those of each teacher layer; empty without features.
        sampling: How tokens were drawn from the logits that rows hold samples of; None without such.
    """

    logits: bool
    classes: int | None
    channels: tuple[int, ...]
    sampling: TokenSampling | None = None

    def fits(self, row: Mapping[str, Tensor], width: int | None) -> bool:
        """Whether a row can be this teacher's, in a batch of samples of `width` tokens."""
        plain = {name.partition("|")[0]: value for name, value in row.items()}
        logits = plain.pop(LOGITS, None)
        drawn = {name: plain.pop(name) for name in (DRAWN, ENTROPY) if name in plain}
        if (logits is not None) != self.logits or bool(plain) != bool(self.channels):
            return False
        if bool(drawn) if self.sampling is None else not are_draws(drawn, self.sampling):
            return False
        if logits is not None and self.classes is not None and self.classes not in logits.shape:
            return False
        cut = (value for name, value in row.items() if name.endswith(ALL_TOKENS))
        short = width is None or all(value.dim() > 0 and len(value) <= width for value in cut)
        return short and all(self._is_layers(name.rpartition("/")[2], value) for name, value in plain.items())

    def _is_layers(self, name: str, value: Tensor) -> bool:
        if name == "mask":
            return value.dim() == 1
        t, _, kind = name.partition(".")
        kind = kind.partition(".")[0]
        if not t.isdigit() or int(t) >= len(self.channels):
            return False
        if kind in (*CHOICE_TENSORS, "summary"):
            return value.dim() == 1
        return kind in LAYER_TENSORS and value.is_floating_point() and self.channels[int(t)] in value.shape


def is_alike(row: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two rows make a batch: the same names, types and shapes, but for the lengths of what is cut."""
    return row.keys() == other.keys() and all(
        value.dtype == other[name].dtype and _fixed(name, value) == _fixed(name, other[name])
        for name, value in row.items()
    )


def _fixed(name: str, value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape[1:] if name.endswith((ALL_TOKENS, CHOSEN_TOKENS)) else value.shape)


def to_rows(
    outputs: TeacherOutputs, lengths: Sequence[int] | None, width: int | None, dtype: torch.dtype | None = None
) -> list[Row]:
    """Return each sample's tensors without padding, and without the teacher's mask.

    `lengths` are the samples' numbers of tokens where padding follows them, `width` that of the padded samples, and
    `dtype` the precision of features, not of logits; what overflows in it is refused (`InputError`).
    """
    pieces = list(_pieces(outputs))
    rows: list[Row] = [{} for _ in range(len(pieces[0].value))]
    counts: dict[int, list[int]] = {}
    for piece in pieces:
        ends: Sequence[int] | None = None
        if piece.chosen is not None:
            # Layers share their choice: its counts are read from the device once.
            if id(piece.chosen) not in counts:
                counts[id(piece.chosen)] = piece.chosen.sum(1).tolist()
            ends = counts[id(piece.chosen)]
        elif piece.along == ALL_TOKENS and piece.value.shape[1] == width:
            ends = lengths
        for index, row in enumerate(rows):
            value = piece.value[index] if ends is None else piece.value[index][: ends[index]]
            name = piece.name if ends is None else piece.name + piece.along
            row[name] = value if piece.name == LOGITS else _narrow(value, dtype)
    return rows


def with_draws(row: Row, sampling: TokenSampling, key: bytes) -> Row:
    """Return a row with tokens drawn from its logits (N, V) in their place: the same ones for the same key."""
    kept: Row = {}
    for name, value in row.items():
        if name.partition("|")[0] == LOGITS:
            ending = name.removeprefix(LOGITS)
            kept |= {kind + ending: drawn for kind, drawn in draw(value, sampling, key).items()}
        else:
            kept[name] = value
    return kept


def check_row_count(outputs: TeacherOutputs, samples: int) -> None:
    """Refuse (`InputError`) outputs with several rows per sample."""
    for piece in _pieces(outputs):
        if len(piece.value) != samples:
            raise InputError(
                "The teacher cache cannot hold this teacher's outputs",
                received=f"{len(piece.value)} rows of `{piece.name}` for {samples} samples (multiple choice?)",
                expected="one row for each sample",
                todo="leave teacher_cache_dir out",
            )


def to_batch(rows: Sequence[Mapping[str, Tensor]], width: int | None) -> Row:
    """Return the rows' tensors stacked, by name; what was cut is filled with zeros, tokens up to the batch's width."""
    stacked = {}
    for name in rows[0] if rows else ():
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


def to_outputs(stored: Mapping[str, Tensor], layers: int) -> TeacherOutputs:
    """Return the outputs that stacked rows were made from; of `layers` teacher layers the loss may keep only some."""
    values = {name.partition("|")[0]: value for name, value in stored.items()}
    logits = values.pop(LOGITS, None)
    sampled = drawn_logits(values.pop(DRAWN), values.pop(ENTROPY)) if DRAWN in values else None
    return TeacherOutputs(logits, _targets(values, layers) if values else TeacherTargets(), sampled=sampled)


def _pieces(outputs: TeacherOutputs) -> Iterator[Piece]:
    yield from _target_pieces(outputs.features)
    if outputs.logits is not None:
        yield Piece(LOGITS, outputs.logits, ALL_TOKENS if outputs.logits.dim() == 3 else "")


def _target_pieces(targets: TeacherTargets) -> Iterator[Piece]:
    for number, part in enumerate(targets.parts):
        yield from (piece._replace(name=f"{number}/{piece.name}") for piece in _target_pieces(part))
    holders: dict[TokenChoice | None, str] = {None: ""}
    for t, layer in enumerate(targets.layers):
        choice = layer.choice or TokenChoice()
        # The chosen tokens come first, and their mask tells how many there are; without one, all places are taken.
        chosen = None if choice.positions is None else choice.mask
        along = ALL_TOKENS if choice.positions is None else CHOSEN_TOKENS
        if layer.choice not in holders:
            holders[layer.choice] = f".{t}"
            for kind in CHOICE_TENSORS:
                if getattr(choice, kind) is not None:
                    yield Piece(f"{t}.{kind}", getattr(choice, kind), along, chosen)
        for kind in LAYER_TENSORS:
            value = getattr(layer, kind)
            if value is not None and kind == "tokens":
                yield Piece(f"{t}.tokens{holders[layer.choice]}", value, along, chosen)
            elif value is not None:
                yield Piece(f"{t}.{kind}", value, ALL_TOKENS if kind == "whole" and value.dim() == 3 else "")
    # A cache refuses encoder-decoders, whose layers have masks of their own.
    if isinstance(targets.mask, Tensor):
        yield Piece("mask", targets.mask, ALL_TOKENS)


def _targets(values: Mapping[str, Tensor], layers: int) -> TeacherTargets:
    parts: dict[int, Row] = {}
    kinds: dict[str, Row] = {str(t): {} for t in range(layers)}
    holders: dict[str, str] = {}
    for name, value in values.items():
        number, joined, rest = name.partition("/")
        if joined:
            parts.setdefault(int(number), {})[rest] = value
        elif name != "mask":
            t, kind, *holder = name.split(".")
            kinds[t][kind] = value
            if holder:
                holders[t] = holder[0]
    if parts:
        return TeacherTargets(parts=tuple(_targets(part, layers) for _, part in sorted(parts.items())))
    choices = {t: TokenChoice(kinds[t].pop("positions", None), kinds[t].pop("mask", None)) for t in kinds}
    entries = [LayerTarget(**kept, choice=choices[holders[t]] if t in holders else None) for t, kept in kinds.items()]
    return TeacherTargets(tuple(entries), values.get("mask"))


def _narrow(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not value.is_floating_point():
        return value
    narrow = value.to(dtype)
    if not bool(torch.isfinite(narrow).all()) and bool(torch.isfinite(value).all()):
        raise InputError(
            "A teacher output does not fit the precision of the cache",
            received=f"values up to {float(value.abs().max()):.3g} with teacher_cache_dtype='{dtype}'",
            expected=f"at most {torch.finfo(dtype).max:.3g}",
            todo="set teacher_cache_dtype to 'bfloat16', or to 'auto' for the teacher's own precision",
        )
    return narrow
