"""Keys of samples and fingerprints of teachers."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .shard import KEY_BYTES

# Changes when what is stored, or how it is keyed, changes.
FORMAT = 3
LOCATION_SETTINGS = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype")
# What runs along the tokens that the mask speaks of; the length of anything else (channels, a decoder's tokens) may
# equal theirs by accident.
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "bbox")


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
    buffers = {f"buffer {name}": value for name, value in model.named_buffers()}
    for name, value in sorted({**buffers, **model.state_dict()}.items()):
        _update(digest, name, value)
    return digest.hexdigest()


def _update(digest: hashlib.blake2b, name: str, value: Tensor) -> None:
    digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


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
