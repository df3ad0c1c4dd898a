"""Models whose weights an engine keeps apart: loaded whole, completed from the first process, gathered for a look."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from ..errors import InputError

# With it transformers reads a model's weights in the first process alone, and leaves them to FSDP.
FSDP_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


@contextmanager
def whole_loading(args: TrainingArguments) -> Iterator[None]:
    """Let `from_pretrained` meanwhile give every process whole weights, which no engine will complete.

    With ZeRO-3 it would give each its part, and with FSDP's efficient loading all of them to the first process.
    """
    plugin = getattr(args, "deepspeed_plugin", None)
    config = getattr(args, "hf_deepspeed_config", None) or getattr(plugin, "dschf", None)
    loading = os.environ.pop(FSDP_LOADING, None)
    if config is not None:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            set_hf_deepspeed_config(config)
        if loading is not None:
            os.environ[FSDP_LOADING] = loading


@contextmanager
def gathered(models: Sequence[nn.Module]) -> Iterator[None]:
    """Show the whole weights of models that ZeRO-3 has partitioned, in every process."""
    parts = [entry for model in models for entry in model.parameters() if is_partitioned(entry)]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        yield


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 keeps a part of a parameter in each process."""
    return hasattr(parameter, "ds_id")


def complete_weights(models: Sequence[nn.Module], accelerator: Accelerator) -> None:
    """Send the first process's weights to those that loaded none (FSDP's efficient loading): they are on `meta`.

    Each process needs the student whole for a moment, to look at its layers. FSDP then divides what it has.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        # Its other way sends parameters alone, and fails on buffers, which the feature loss has (accelerate 1.15).
        plugin.cpu_ram_efficient_loading = False
    missing = any(entry.is_meta for model in models for _, entry in _tensors(model))
    flag = torch.tensor(float(missing), device=accelerator.device)
    if accelerator.num_processes == 1 or not accelerator.reduce(flag, reduction="sum"):
        return
    for model in models:
        if any(entry.is_meta for _, entry in _tensors(model)):
            # Buffers that are not saved are whole in every process.
            known = {name: entry for name, entry in model.named_buffers() if not entry.is_meta}
            model.to_empty(device="cpu")
            for name, value in known.items():
                model.get_buffer(name).copy_(value)
            tie = getattr(model, "tie_weights", None)
            if tie is not None:
                tie()
        for _, entry in _tensors(model):
            # To the device and back: a backend such as NCCL sends nothing else.
            entry.data.copy_(broadcast(entry.data.to(accelerator.device)))


def check_same_teacher(models: Sequence[nn.Module], accelerator: Accelerator) -> None:
    """Refuse (`InputError`) teachers that are not the same in every process: each would teach something else."""
    if accelerator.num_processes == 1 or not models:
        return
    sums = torch.stack([_checksum(model) for model in models]).to(accelerator.device)
    of_all = accelerator.gather(sums.unsqueeze(0))
    different = [place for place in range(len(models)) if not (of_all[:, place] == of_all[0, place]).all()]
    if different:
        raise InputError(
            "The teacher's weights are not the same in every process",
            received=f"other weights of {type(models[different[0]]).__name__} in another process",
            expected="one teacher, loaded from the same files everywhere",
            todo="pass the teacher's name or folder, or load it from saved files before the trainer is made",
        )


def _checksum(model: nn.Module) -> Tensor:
    """Return a sum over a model's weights, 0 where an engine has divided them."""
    whole = [entry for _, entry in _tensors(model) if entry.is_floating_point() and not _divided(entry)]
    zero = torch.zeros((), dtype=torch.float64)
    return torch.stack([zero, *(entry.detach().double().abs().sum().cpu() for entry in whole)]).sum()


def _divided(entry: Tensor) -> bool:
    return is_partitioned(entry) or hasattr(entry, "placements") or entry.is_meta


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())
