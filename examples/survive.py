"""Survive dead ranks and nodes: four lines in a loop of plain FSDP2.

    torchrun --nproc-per-node 4 --max-restarts 10 examples/survive.py

Lines that end in "# +" are new, or replace those that start with "# -". Kill any rank with SIGKILL:
torchrun starts the ranks again, and they go on with the step that would have been next, bit for
bit as if nothing had happened. No file on a disk is written or read.
"""

import torch
import torch.distributed as dist
from torch import nn

# - from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mics  # +

WIDTH, LAYERS, STEPS, SAMPLES = 64, 4, 20, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def main() -> None:
    # torchrun's store still has the addresses of dead ranks when it starts them again, and
    # init_process_group would read those; init_mesh lets every attempt meet under a new name.
    # - dist.init_process_group()
    # - mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    mesh = mics.init_mesh(partition=2)  # +

    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(LAYERS)], nn.Linear(WIDTH, 1))
    for block in model[:-1]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    snapshots = mics.Snapshots(model, optimizer, extras={"scheduler": scheduler})  # +
    # - step = 0
    step = snapshots.restore()  # +
    while step < STEPS:
        data = torch.Generator().manual_seed(1000 * step + dist.get_rank())  # of this step
        x = torch.randn(SAMPLES, WIDTH, generator=data)
        loss = nn.functional.mse_loss(model(x), x.square().mean(dim=-1, keepdim=True))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if dist.get_rank() == 0:
            print(f"step {step + 1:>2}/{STEPS}  loss {loss.item():.4f}", flush=True)
        # - step += 1
        step = snapshots.keep(step + 1)  # +
    snapshots.close()  # +
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
