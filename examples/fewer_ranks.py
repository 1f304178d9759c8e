"""Go on with fewer ranks, and with more again: the same samples in every step, the same losses.

    torchrun --nproc-per-node 4 examples/fewer_ranks.py
    torchrun --nproc-per-node 2 examples/fewer_ranks.py                     # the same losses

Kill it and start it with another number of ranks and MICS_JOB=NAME: it goes on where it was, as
long as every shard is in some node's memory. No file on a disk is written or read.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics

WIDTH, LAYERS, STEPS, SAMPLES = 64, 4, 20, 4
MICRO_BATCHES = 6  # of a step, over all ranks, however many these are


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def micro_batch(step: int, index: int) -> torch.Tensor:
    """Samples of a step by their number: the same on whichever rank."""
    data = torch.Generator().manual_seed(1000 * step + index)
    return torch.randn(SAMPLES, WIDTH, generator=data)


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(LAYERS)], nn.Linear(WIDTH, 1))
    model = mics.shard(model, partition=2, mp_policy=MixedPrecisionPolicy())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    snapshots = mics.Snapshots(model, optimizer, extras={"scheduler": scheduler})
    step = snapshots.restore()
    while step < STEPS:
        total = torch.zeros(())
        for micro in mics.deal(model, MICRO_BATCHES):
            x = micro_batch(step, micro.index)
            loss = nn.functional.mse_loss(model(x), x.square().mean(dim=-1, keepdim=True))
            total += micro.backward(loss)  # zero where the micro-batch is another rank's to count
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"step {step + 1:>2}/{STEPS}  loss {total / MICRO_BATCHES:.4f}", flush=True)
        step = snapshots.keep(step + 1)
    snapshots.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
