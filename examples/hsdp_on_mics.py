"""The same on mics: all-reduces between replicas in the last micro-step only.

torchrun --nproc-per-node 4 examples/hsdp_on_mics.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from mics import fully_shard, micro_steps

WIDTH, LAYERS, STEPS, MICRO_STEPS, SAMPLES = 64, 4, 20, 4, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def main() -> None:
    dist.init_process_group()
    device = "cpu"
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank())
        device = "cuda"
    world = dist.get_world_size()
    mesh = init_device_mesh(device, (2, world // 2), mesh_dim_names=("replicate", "shard"))

    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(LAYERS)], nn.Linear(WIDTH, 1)).to(device)
    for block in model[:-1]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    torch.manual_seed(1 + dist.get_rank())  # every rank has samples of its own
    inputs = torch.randn(MICRO_STEPS, SAMPLES, WIDTH, device=device)
    batch = [(x, x.square().mean(dim=-1, keepdim=True)) for x in inputs]
    for step in range(STEPS):
        total = torch.zeros((), device=device)
        for x, y in micro_steps(model, batch):
            loss = nn.functional.mse_loss(model(x), y) / MICRO_STEPS
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"step {step + 1:>2}/{STEPS}  loss {total.item() / world:.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
