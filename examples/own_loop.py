"""A loop that calls a function per micro-batch, as trainers do, with mics.micro_step.

    torchrun --nproc-per-node 4 examples/own_loop.py

Lines that end in "# +" replace those that start with "# -". ``training_step`` sees one micro-batch
and does not know how many there are; the trainer does, and says which one is the last.
"""

# - import contextlib
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy  # +

# - from torch.nn.parallel import DistributedDataParallel
import mics  # +

WIDTH, LAYERS, STEPS, MICRO_STEPS, SAMPLES = 64, 4, 20, 4, 16

Batch = tuple[torch.Tensor, torch.Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Trainer:
    """A trainer of the usual form: one call per micro-batch, a step after the last of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def step(self, batch: list[Batch]) -> torch.Tensor:
        total = torch.zeros((), device=batch[0][0].device)
        for i, micro_batch in enumerate(batch):
            last = i == len(batch) - 1
            # - with contextlib.nullcontext() if last else self.model.no_sync():
            with mics.micro_step(self.model, last=last):  # +
                total += self.training_step(micro_batch, len(batch))
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def training_step(self, micro_batch: Batch, micro_steps: int) -> torch.Tensor:
        inputs, targets = micro_batch
        # Divided by hand, as before; with normalise="micro_steps" mics would divide.
        loss = nn.functional.mse_loss(self.model(inputs), targets) / micro_steps
        loss.backward()
        return loss.detach()


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
    trainer = Trainer(model)

    torch.manual_seed(1 + dist.get_rank())  # every rank has samples of its own
    x = torch.randn(MICRO_STEPS, SAMPLES, WIDTH, device=device)
    y = x.square().mean(dim=-1, keepdim=True)
    batch = list(zip(x, y, strict=True))
    for step in range(STEPS):
        total = trainer.step(batch)
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"step {step + 1:>2}/{STEPS}  loss {total.item() / world:.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
