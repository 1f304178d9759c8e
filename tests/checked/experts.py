"""HSDP with experts that nobody reduces: left out, or on a mesh of one replica."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16, 16) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bw,nwv->bv", x, self.weight).clone()


def main(left_out: bool) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), Experts(), nn.Linear(16, 4))
    if left_out:
        fully_shard(model, mesh=mesh, ignored_params=set(model[1].parameters()))
    else:
        fully_shard(model[1], mesh=mesh["dp_shard"])
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.manual_seed(dist.get_rank())
    for _ in range(10):
        for i in range(2):
            model.set_requires_all_reduce(i == 1)
            model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


main(left_out="left-out" in sys.argv)
