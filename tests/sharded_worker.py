"""Run by torchrun: the feature loss in a student with sharded parameters (FSDP2), against the same unsharded."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_semckd.features.targets import TeacherTargets
from hf_semckd.losses import SemCKDLoss

LAYERS, TEACHERS, TOKENS = 3, 4, 20


class Student(nn.Module):
    """A stack of layers with the feature loss inside its forward, as in training."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(LAYERS))
        self.calibration = SemCKDLoss([(TOKENS, 8)] * LAYERS, [(TOKENS, 12)] * TEACHERS, max_tokens=6)

    def forward(self, x: torch.Tensor, targets: TeacherTargets) -> torch.Tensor:
        states = []
        for block in self.blocks:
            x = torch.tanh(block(x))
            states.append(x)
        return self.calibration(states, targets).total


def build() -> Student:
    torch.manual_seed(0)
    model = Student().double()
    model.calibration.automatic_synchronization = False
    return model


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(world, 5, TOKENS, 8, generator=generator, dtype=torch.float64)
    features = torch.randn(TEACHERS, world, 5, TOKENS, 12, generator=generator, dtype=torch.float64)
    plain, sharded = build(), build()
    selected = [plain.calibration.select(list(features[:, r])) for r in range(world)]
    loss = sum(plain(inputs[r], selected[r]) for r in range(world)) / world
    loss.backward()
    mesh = init_device_mesh("cpu", (world,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded(inputs[rank], selected[rank]).backward()
    expected = dict(plain.named_parameters())
    sizes = []
    for name, parameter in sharded.named_parameters():
        assert type(parameter).__name__ == "DTensor", name
        sizes.append(parameter.to_local().numel() < parameter.numel())
        whole = parameter.grad.full_tensor()
        torch.testing.assert_close(whole, expected[name].grad, rtol=1e-10, atol=1e-12)
    assert all(sizes), "nothing was sharded"
    print(f"sharded over {world}: {len(sizes)} parameters agree")
    # Neither may leave while the other still receives.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
