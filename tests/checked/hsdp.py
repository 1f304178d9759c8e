"""FSDP2 and HSDP as people write them, right and wrong; an endless loop."""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

MICRO_STEPS = 4


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))


def set_flags(model: nn.Module, way: str, last: bool) -> None:
    if way in ("right", "seeds", "rates"):
        model.set_requires_all_reduce(last)
    if way == "unsharded":
        model.set_requires_gradient_sync(last)
    if way == "never":
        model.set_requires_all_reduce(False)


def main(way: str) -> None:
    dist.init_process_group("nccl")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    if way == "full":
        mesh = init_device_mesh("cpu", (4,))
    replica = dist.get_rank() // 2
    torch.manual_seed(replica if way == "seeds" else 0)
    model = nn.Sequential(*[block() for _ in range(3)], nn.Linear(32, 1))
    for one in model[:-1]:
        fully_shard(one, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rate = 1e-3 * (1 + replica) if way == "rates" else 1e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    torch.manual_seed(1 + dist.get_rank())
    while True:
        for i in range(MICRO_STEPS):
            set_flags(model, way, i == MICRO_STEPS - 1)
            (model(torch.randn(8, 32)).square().mean() / MICRO_STEPS).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", default="right")
    main(parser.parse_args().way)
