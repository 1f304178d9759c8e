"""From DistributedDataParallel to mics: the model's line and the loop's line.

    torchrun --nproc-per-node 4 examples/from_ddp.py

Lines that end in "# +" replace those that start with "# -". The optimizer, ``backward()`` and
``step()`` stay.
"""

# - import contextlib
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy  # +

# - from torch.nn.parallel import DistributedDataParallel
import mics  # +

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
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    world = dist.get_world_size()

    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(LAYERS)], nn.Linear(WIDTH, 1)).to(device)
    # - model = DistributedDataParallel(model)
    # The policy keeps fp32 throughout, as DDP does; without it mics computes in bf16.
    fp32 = MixedPrecisionPolicy()  # +
    model = mics.shard(model, partition=world // 2, mp_policy=fp32)  # +
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    torch.manual_seed(1 + dist.get_rank())  # every rank has samples of its own
    x = torch.randn(MICRO_STEPS, SAMPLES, WIDTH, device=device)
    y = x.square().mean(dim=-1, keepdim=True)
    batch = list(zip(x, y, strict=True))
    for step in range(STEPS):
        total = torch.zeros((), device=device)
        # - for i, (inputs, targets) in enumerate(batch):
        # -     last = i == len(batch) - 1
        # -     with contextlib.nullcontext() if last else model.no_sync():
        # -         loss = nn.functional.mse_loss(model(inputs), targets) / len(batch)
        # -         loss.backward()
        # -     total += loss.detach()
        for inputs, targets in mics.micro_steps(model, batch, normalise="micro_steps"):  # +
            loss = nn.functional.mse_loss(model(inputs), targets)  # +
            loss.backward()  # +
            total += loss.detach() / len(batch)  # +
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"step {step + 1:>2}/{STEPS}  loss {total.item() / world:.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
