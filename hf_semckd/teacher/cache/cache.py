"""Teacher outputs on disk, keyed by what the teacher was given, so that no epoch and no run computes them twice."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ...data.columns import CACHED, teacher_entries
from ...losses.sampled_logits import TokenSampling
from ..outputs import TeacherOutputs
from ..placement import named_weights
from .rows import Row, RowCheck, check_row_count, is_alike, to_batch, to_rows, with_draws
from .shard import KEY_BYTES
from .store import TensorStore

logger = logging.getLogger(__name__)
# Changes when what is stored, or how it is keyed, changes.
FORMAT = 4
LOCATION_SETTINGS = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype")
# What runs along the tokens that the mask speaks of; the length of anything else (channels, a decoder's tokens) may
# equal theirs by accident.
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "bbox")


@dataclass
class Lookup:
    """What the cache holds of a batch: each sample's key and whether it is there, and what is there as `to_batch`."""

    keys: list[bytes]
    present: list[bool]
    values: dict[str, Tensor]


@dataclass(eq=False)
class TeacherCache:
    """The outputs of one teacher for one choice of layers, one row per sample in a `TensorStore`.

    The key is the content of the teacher's inputs after preprocessing and augmentation, without padding. A changed
    dataset, tokenizer, image size or random crop is therefore another sample, never a wrong hit.

    Attributes:
        dtype: Precision of stored features; None for that of the teacher. Logits always keep theirs.
        cut: Whether padding can be cut off; not for models that pool tokens or put others in front of them.
        check: What stored rows must look like; None takes any.
        sampling: How tokens are drawn from logits, to be stored in their place; None where these are.
    """

    store: TensorStore
    select_inputs: Callable[[Mapping[str, Any]], dict[str, Any]]
    dtype: torch.dtype | None = None
    cut: bool = True
    check: RowCheck | None = None
    sampling: TokenSampling | None = None

    @property
    def name(self) -> str:
        """The folder's name, which follows from the teacher and from what is stored of it."""
        return self.store.folder.name

    def keys(self, batch: Mapping[str, Any]) -> list[bytes]:
        """Return the key of each sample of a batch."""
        inputs = self.select_inputs(teacher_entries(batch))
        return sample_keys(inputs, self._lengths(inputs))

    def look_up(self, batch: Mapping[str, Any], keys: list[bytes] | None = None) -> Lookup:
        """Return what there is of a batch, on the CPU; `keys` are those of its samples, where they are known."""
        keys = self.keys(batch) if keys is None else keys
        width = token_count(self.select_inputs(teacher_entries(batch)))
        read = self.store.read(keys)
        rows = [row if row is None or self.check is None or self.check.fits(row, width) else None for row in read]
        found = [row for row in rows if row is not None]
        rows = [row if row is not None and is_alike(row, found[0]) else None for row in rows]
        if sum(row is None for row in rows) > sum(row is None for row in read):
            logger.warning(
                "Stored teacher outputs in %s are not this teacher's and are made again.", self.store.folder
            )
        found = [row for row in rows if row is not None]
        return Lookup(keys, [row is not None for row in rows], to_batch(found, width))

    def rows(
        self,
        outputs: TeacherOutputs,
        inputs: Mapping[str, Any],
        keys: Sequence[bytes],
        samples: Sequence[int] | None = None,
    ) -> list[Row]:
        """Return what is stored of each sample, where the outputs are those of some (`samples`) or all of a batch.

        `inputs` and `keys` are those of the whole batch: it decides what is cut, as it does in the keys. Several rows
        per sample, and what overflows in the cache's precision, are refused (`InputError`).
        """
        samples = range(len(keys)) if samples is None else samples
        check_row_count(outputs, len(samples))
        lengths = self._lengths(inputs)
        ends = None if lengths is None else [lengths[index] for index in samples]
        rows = to_rows(outputs, ends, token_count(inputs), self.dtype)
        if self.sampling is None:
            return rows
        return [with_draws(row, self.sampling, keys[index]) for row, index in zip(rows, samples, strict=True)]

    def _lengths(self, inputs: Mapping[str, Any]) -> list[int] | None:
        return right_padded_lengths(inputs) if self.cut else None


class CachingCollator:
    """A collator that also looks its samples up in the teacher cache, so that the step need not wait for the disk.

    A worker process of the data loader does this beside the training, without workers a thread (`in_thread`). Each of
    several teachers has a collator of its own around the last one.
    """

    def __init__(self, collator: Callable[[Any], Mapping[str, Any]], cache: TeacherCache, *, in_thread: bool):
        self.collator = collator
        self.cache = cache
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher-cache") if in_thread else None

    def __call__(self, samples: Any) -> dict[str, Any]:
        """Return the batch, with what the cache holds of it under `CACHED`."""
        batch, look_up = dict(self.collator(samples)), self.cache.look_up
        found = vars(look_up(batch)) if self._thread is None else self._thread.submit(look_up, batch)
        return {**batch, CACHED: {**batch.get(CACHED, {}), self.cache.name: found}}


def lookup_of(batch: Mapping[str, Any], cache: TeacherCache) -> Lookup | None:
    """Return what the `CachingCollator` of a cache left in a batch, or None."""
    left = batch.get(CACHED, {}).get(cache.name)
    if isinstance(left, Future):
        return left.result()
    return None if left is None else Lookup(**left)


def token_count(inputs: Mapping[str, Any]) -> int | None:
    """Return the number of tokens of a batch's padded samples, or None where there is no mask."""
    mask = inputs.get("attention_mask")
    return mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else None


def sample_keys(inputs: Mapping[str, Any], lengths: Sequence[int] | None) -> list[bytes]:
    """Return one key per sample: a digest of its inputs, cut to its own length; `lengths` None cuts nothing."""
    tensors = {name: value.detach().cpu() for name, value in sorted(inputs.items()) if isinstance(value, Tensor)}
    # What is stored of a sample looks different where padding was cut off.
    constants = repr((lengths is None, sorted((k, repr(value)) for k, value in inputs.items() if k not in tensors)))
    width = token_count(inputs)
    keys = []
    for index in range(len(next(iter(tensors.values())))):
        digest = hashlib.blake2b(constants.encode(), digest_size=KEY_BYTES)
        for name, value in tensors.items():
            row = value[index]
            if lengths is not None and name in TOKEN_INPUTS and row.dim() and row.shape[0] == width:
                row = row[: lengths[index]]
            _update(digest, name, row)
        keys.append(digest.digest())
    return keys


def right_padded_lengths(inputs: Mapping[str, Any]) -> list[int] | None:
    """Return the length of each sample where padding follows the tokens, or None when anything else is masked."""
    if token_count(inputs) is None:
        return None
    mask = inputs["attention_mask"].bool()
    return None if bool((mask[:, 1:] & ~mask[:, :-1]).any()) else mask.sum(1).tolist()


def teacher_fingerprint(weights: str, layers: Sequence[object], logits: bool, kept: str) -> str:
    """Return a digest of all that decides what is stored of a teacher's outputs, besides its inputs."""
    described = repr((FORMAT, weights, list(map(str, layers)), logits, kept))
    return hashlib.blake2b(described.encode(), digest_size=KEY_BYTES).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Return a digest of a model's kind, configuration and weights, all of which are read once."""
    digest = hashlib.blake2b(type(model).__qualname__.encode(), digest_size=KEY_BYTES)
    config: Any = getattr(model, "config", None)
    settings = dict(config.to_dict()) if hasattr(config, "to_dict") else _attributes(model)
    # Where the weights came from does not matter: they are digested themselves.
    described = repr(sorted((key, value) for key, value in settings.items() if key not in LOCATION_SETTINGS))
    digest.update((described + _adapters(model)).encode())
    # Not state_dict(): on a CPU that changes what a 4-bit model of bitsandbytes computes.
    for name, value in sorted(named_weights(model), key=itemgetter(0)):
        _update(digest, name, value)
        scales = getattr(getattr(value, "quant_state", None), "absmax", None)
        if isinstance(scales, Tensor):
            _update(digest, f"{name}.absmax", scales)
    return digest.hexdigest()


def _update(digest: hashlib.blake2b, name: str, value: Tensor) -> None:
    digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
    if hasattr(value, "__tensor_flatten__"):
        # A tensor made of others (quantized by torchao, say), which has no bytes of its own.
        for part in value.__tensor_flatten__()[0]:
            _update(digest, part, getattr(value, part))
        return
    # As a plain tensor: to move one of bitsandbytes would quantize it anew.
    digest.update(
        value.detach().as_subclass(Tensor).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    )


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
