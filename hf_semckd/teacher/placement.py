"""Where a teacher's weights are: on the device, on several, divided among processes, or in the host's memory."""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from accelerate import cpu_offload, dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch import Tensor, nn

from ..choices import TeacherPlacement
from ..errors import InputError

Placer = Callable[[nn.Module, torch.device], None]


def place(model: nn.Module, device: torch.device, placement: TeacherPlacement) -> None:
    """Bring a teacher to where it is to be; one that looks after its own placement stays where it is.

    So one that was placed in the same way before, by another trainer or by its owner, is taken again.

    Raises:
        InputError: For a placement of a model that is quantized, or dispatched, offloaded or sharded in another way.
    """
    if is_placed(model):
        own = placement_of(model)
        if placement not in ("device", own):
            raise InputError(
                "The teacher has a placement of its own already",
                received=f"teacher_placement={placement!r} and a {type(model).__name__} that is "
                + ("quantized, dispatched or sharded" if own is None else f"placed by {own!r}"),
                expected="one of them",
                todo="leave teacher_placement out, or pass the teacher as from_pretrained gives it",
            )
        _run_partitioned(model)
        return
    if placement == "device":
        model.to(device)
        return
    _PLACERS[placement](model, device)


def is_placed(model: nn.Module) -> bool:
    """Whether a model looks after its own placement: quantized, dispatched, offloaded or sharded."""
    return bool(getattr(model, "is_quantized", False)) or is_spread(model)


def placement_of(model: nn.Module) -> TeacherPlacement | None:
    """Return the `teacher_placement` that a model has; None for none of them, or one that none of them makes."""
    if any(is_sharded(entry) for entry in model.parameters()):
        # Tensor parallelism and ZeRO-3 divide a model, too. Not part of torch on every system.
        from torch.distributed.fsdp import FSDPModule

        return "shard" if isinstance(model, FSDPModule) else None
    if getattr(model, "hf_device_map", None) is not None:
        return "device_map"
    return "offload" if any(entry.is_meta for entry in model.parameters()) and is_spread(model) else None


def is_spread(model: nn.Module) -> bool:
    """Whether a model may not be on one device, whole: dispatched, be it to a single one, offloaded, or sharded."""
    return getattr(model, "hf_device_map", None) is not None or not is_whole(model)


def is_whole(model: nn.Module) -> bool:
    """Whether a process has all of a model's weights, and nothing moves them: it can be copied, moved and saved."""
    hooked = any(hasattr(module, "_hf_hook") or hasattr(module, "_fsdp_wrapped_module") for module in model.modules())
    return not hooked and not any(is_sharded(entry) for entry in model.parameters())


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether a process holds a part of a parameter: a DTensor (FSDP2, tensor parallelism), or of ZeRO-3."""
    return hasattr(parameter, "placements") or hasattr(parameter, "ds_id")


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name, those of an offloaded model from where they wait; each once, if tied."""
    seen: set[int] = set()
    for name, entry in chain(model.named_parameters(), model.named_buffers()):
        waiting = _waiting(model, name) if entry.is_meta else None
        if waiting is None:
            yield name, entry
        elif waiting.numel() == 0 or waiting.data_ptr() not in seen:
            seen.add(waiting.data_ptr())
            yield name, waiting


def _waiting(model: nn.Module, name: str) -> Tensor | None:
    """Return the weight that a hook of accelerate brings to the device when its module runs."""
    owner, _, own = name.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    maps = (getattr(entry, "weights_map", None) for entry in getattr(hook, "hooks", [hook]))
    return next((weights[own] for weights in maps if weights is not None), None)


def _shard(model: nn.Module, device: torch.device) -> None:
    """Divide a model among all processes with FSDP2: a block's weights are together only while it runs."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        model.to(device)
        return
    # Not part of torch on every system.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    # What is outside of the blocks would stay together after a forward, by default.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost repeated modules of a model, whose weights are gathered one after the other."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) > 1:
                found.extend(entry for entry in child if any(True for _ in entry.parameters()))
            else:
                visit(child)

    visit(model)
    return found


def _offload(model: nn.Module, device: torch.device) -> None:
    """Keep a model's weights in the host's memory, and bring each layer's to the device while it runs."""
    # "cpu:0", one of several processes on CPUs, is another device to accelerate, and parameters become plain tensors.
    cpu_offload(model, torch.device("cpu") if device.type == "cpu" else device, offload_buffers=True)


def _dispatch(model: nn.Module, device: torch.device) -> None:
    """Divide a model's layers among all devices of this process, and the host where they do not fit."""
    kept = getattr(model, "_no_split_modules", None)
    # In equal shares: whatever fits would be put beside the student otherwise.
    room = get_balanced_memory(model, no_split_module_classes=kept)
    devices = infer_auto_device_map(model, max_memory=room, no_split_module_classes=kept)
    dispatch_model(model, device_map=devices)
    model.hf_device_map = devices


def _run_partitioned(model: nn.Module) -> None:
    """Let a model that ZeRO-3 partitioned as it was made gather its layers while they run."""
    if not any(hasattr(entry, "ds_id") for entry in model.parameters()):
        return
    import deepspeed

    config: Mapping[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    deepspeed.initialize(model=model, config=config)


_PLACERS: dict[str, Placer] = {"shard": _shard, "offload": _offload, "device_map": _dispatch}
