"""Teacher outputs on disk, keyed by what the teacher was given, so that no epoch and no run computes them twice."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .data import teacher_entries
from .errors import InputError, message
from .shards import KEY_BYTES
from .store import TensorStore

# Changes when what is stored, or how it is keyed, changes.
FORMAT = 2
LOCATION_SETTINGS = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype")
# The entry of a batch in which a collator leaves what the cache holds of its samples.
CACHED = "cached_teacher"
# Behind the name of a stored tensor that was cut: it runs along all tokens of its sample, or along the chosen ones.
ALL_TOKENS, CHOSEN_TOKENS = "|all", "|chosen"
CHOSEN_KINDS = ("tokens", "positions", "mask")
# What runs along the tokens that the mask speaks of; the length of anything else (channels, a decoder's tokens) may
# equal theirs by accident.
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "bbox")


@dataclass
class Lookup:
    """What the cache holds of a batch's samples.

    Attributes:
        keys: The key of each sample.
        present: Whether each sample is there.
        values: The tensors of the samples that are, stacked, by stored name.
    """

    keys: list[bytes]
    present: list[bool]
    values: dict[str, Tensor]


class TeacherCache:
    """Teacher outputs in a `TensorStore`, one row a sample, below a folder for one teacher and one choice of layers.

    The key is the content of the teacher's inputs after preprocessing and augmentation, without padding. A changed
    dataset, tokenizer, image size or random crop is therefore another sample, never a wrong hit.

    Args:
        folder: Where all caches live; made when needed.
        fingerprint: What the outputs depend on besides the inputs; see `teacher_fingerprint`.
        select_inputs: Returns the teacher's inputs of a batch.
        dtype: Precision of stored features; None for that of the teacher. Logits always keep theirs.
        limit_bytes: Most that the folder may take; None for what the disk can spare.
        cut: Whether outputs that are as long as the mask run along it, so that padding can be cut off; False for
            models that pool tokens or put others in front of them.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        fingerprint: str,
        select_inputs: Callable[[Mapping[str, Any]], dict[str, Any]],
        *,
        dtype: torch.dtype | None = None,
        limit_bytes: int | None = None,
        cut: bool = True,
    ):
        self.cut = cut
        self.store = TensorStore(Path(folder) / fingerprint, limit_bytes=limit_bytes)
        self.select_inputs = select_inputs
        self.dtype = dtype

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the teacher's inputs of a batch, as they were collated."""
        return self.select_inputs(teacher_entries(batch))

    def keys(self, batch: Mapping[str, Any]) -> list[bytes]:
        """Return the key of each sample of a batch."""
        inputs = self.inputs(batch)
        return sample_keys(inputs, self.lengths(inputs))

    def lengths(self, inputs: Mapping[str, Any]) -> list[int] | None:
        """Return the length of each sample where its padding is cut off, or None."""
        return right_padded_lengths(inputs) if self.cut else None

    def look_up(self, batch: Mapping[str, Any]) -> Lookup:
        """Return what there is of a batch, on the CPU."""
        return self.read(self.keys(batch), token_count(self.inputs(batch)))

    def read(self, keys: list[bytes], width: int | None) -> Lookup:
        """Return what there is under some keys, on the CPU.

        Args:
            keys: The keys of a batch's samples.
            width: Number of tokens of the padded samples.
        """
        rows = self.store.read(keys)
        found = [row for row in rows if row is not None]
        return Lookup(keys, [row is not None for row in rows], to_batch(found, width))

    def rows(self, outputs: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """Return what is stored of each sample of the teacher's outputs.

        Raises:
            InputError: When the outputs have several rows a sample.
        """
        samples = len(next(value for value in inputs.values() if isinstance(value, Tensor)))
        for name, value in outputs.items():
            if len(value) != samples:
                raise InputError(
                    message(
                        "The teacher cache cannot hold this teacher's outputs",
                        received=f"{len(value)} rows of `{name}` for {samples} samples (multiple choice?)",
                        expected="one row for each sample",
                        todo="leave teacher_cache_dir out",
                    )
                )
        rows = to_rows(outputs, self.lengths(inputs), token_count(inputs))
        if self.dtype is None:
            return rows
        return [{name: self._narrow(name, value) for name, value in row.items()} for row in rows]

    def _narrow(self, name: str, value: Tensor) -> Tensor:
        if self.dtype is None or not value.is_floating_point() or name.startswith("logits"):
            return value
        narrow = value.to(self.dtype)
        if not bool(torch.isfinite(narrow).all()) and bool(torch.isfinite(value).all()):
            raise InputError(
                message(
                    "A teacher output does not fit the precision of the cache",
                    received=f"values up to {float(value.abs().max()):.3g} with teacher_cache_dtype='{self.dtype}'",
                    expected=f"at most {torch.finfo(self.dtype).max:.3g}",
                    todo="set teacher_cache_dtype to 'bfloat16', or to 'auto' for the teacher's own precision",
                )
            )
        return narrow


class CachingCollator:
    """A collator that also looks its samples up in the teacher cache, so that the step need not wait for the disk.

    In a worker process of the data loader this runs beside the training; without workers a thread does it, while the
    step before is computed.

    Args:
        collator: Makes the batch.
        cache: Is asked for its samples.
        in_thread: Whether to look up in a thread of this process.
    """

    def __init__(self, collator: Callable[[Any], Mapping[str, Any]], cache: TeacherCache, *, in_thread: bool):
        self.collator = collator
        self.cache = cache
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher-cache") if in_thread else None

    def __call__(self, samples: Any) -> dict[str, Any]:
        """Return the batch, with what the cache holds of it under `CACHED`."""
        batch = dict(self.collator(samples))
        if self._thread is not None:
            return {**batch, CACHED: self._thread.submit(self.cache.look_up, batch)}
        return {**batch, CACHED: vars(self.cache.look_up(batch))}


def lookup_of(batch: Mapping[str, Any]) -> Lookup | None:
    """Return what a `CachingCollator` left in a batch, or None."""
    left = batch.get(CACHED)
    if isinstance(left, Future):
        return left.result()
    return None if left is None else Lookup(**left)


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


def token_count(inputs: Mapping[str, Any]) -> int | None:
    """Return the number of tokens of a batch's padded samples, or None where there is no mask."""
    mask = inputs.get("attention_mask")
    return mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else None


def sample_keys(inputs: Mapping[str, Any], lengths: Sequence[int] | None) -> list[bytes]:
    """Return one key a sample: a digest of its inputs, cut to its own length where it is padded.

    Args:
        inputs: The teacher's inputs; tensors whose first dimension is the batch.
        lengths: Number of tokens of each sample, when padding follows them; None when nothing is cut.
    """
    tensors = {name: value.detach().cpu() for name, value in sorted(inputs.items()) if isinstance(value, Tensor)}
    # What is stored of a sample looks different where padding was cut off.
    constants = repr((lengths is None, sorted((k, repr(value)) for k, value in inputs.items() if k not in tensors)))
    width = inputs["attention_mask"].shape[1] if lengths is not None else None
    keys = []
    for index in range(len(next(iter(tensors.values())))):
        digest = hashlib.blake2b(constants.encode(), digest_size=KEY_BYTES)
        for name, value in tensors.items():
            row = value[index]
            if lengths is not None and name in TOKEN_INPUTS and row.dim() and row.shape[0] == width:
                row = row[: lengths[index]]
            digest.update(f"{name}:{row.dtype}:{tuple(row.shape)};".encode())
            digest.update(row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        keys.append(digest.digest())
    return keys


def right_padded_lengths(inputs: Mapping[str, Any]) -> list[int] | None:
    """Return the length of each sample where padding follows the tokens, or None when anything else is masked."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    mask = mask.bool()
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        return None
    return [int(length) for length in mask.sum(1).tolist()]


def teacher_fingerprint(weights: str, layers: Sequence[object], logits: bool, kept: str = "") -> str:
    """Return a digest of all that decides a teacher's outputs besides its inputs: weights, kind, layers.

    Args:
        weights: See `weights_digest`.
        layers: The layers that are stored.
        logits: Whether logits are stored.
        kept: What is kept of these layers, and in which precision.
    """
    described = repr((FORMAT, weights, list(map(str, layers)), logits, kept))
    return hashlib.blake2b(described.encode(), digest_size=KEY_BYTES).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Return a digest of a model's kind, configuration and weights, all of which are read once."""
    digest = hashlib.blake2b(type(model).__qualname__.encode(), digest_size=KEY_BYTES)
    config: Any = getattr(model, "config", None)
    settings = dict(config.to_dict()) if hasattr(config, "to_dict") else _attributes(model)
    # Where the weights came from does not matter: they are digested themselves.
    described = repr(sorted((key, value) for key, value in settings.items() if key not in LOCATION_SETTINGS))
    digest.update(described.encode())
    digest.update(_adapters(model).encode())
    buffers = {f"buffer {name}": value for name, value in model.named_buffers()}
    for name, value in sorted({**buffers, **model.state_dict()}.items()):
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _adapters(model: nn.Module) -> str:
    """Say which adapters (PEFT) are on, and how: scaled, merged, disabled. Neither weights nor configuration tell."""
    settings = getattr(model, "peft_config", None)
    if not isinstance(settings, Mapping):
        return ""
    said = [repr(sorted((name, repr(entry)) for name, entry in settings.items()))]
    for name, module in model.named_modules():
        state = [getattr(module, key, None) for key in ("active_adapters", "scaling", "merged", "disable_adapters")]
        if any(entry is not None for entry in state):
            said.append(f"{name}: {state}")
    return "\n".join(said)


def _attributes(model: nn.Module) -> dict[str, Any]:
    """Return what a model without a configuration says of itself: its parts, and the plain values that they hold."""
    held = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, tuple)) and key != "training" and not key.startswith("_")
    }
    return {"model": repr(model), **held}
