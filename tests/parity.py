"""Train the same thing on one process and on many, and say how far apart they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from ranks import mesh_of_rank
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics.ranks.device import default_device_type

WIDTH = 13
ROWS = 4  # per rank and micro-step


class Block(nn.Module):
    """Uneven shapes: nothing here divides by 2, 4 or 8."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 17)
        self.down = nn.Linear(17, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    """Blocks between an embedding-like and a head-like layer, with the oddities of real models."""

    def __init__(
        self, *, tied: bool = False, frozen: bool = False, uses: int = 1, num_blocks: int = 2
    ) -> None:
        super().__init__()
        self.uses = uses
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("scale", torch.tensor(0.5))
        if tied:
            self.last.weight = self.first.weight
        if frozen:
            self.blocks[0].requires_grad_(False)
            self.blocks[1].up.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            for _ in range(self.uses):
                x = block(x)
        return self.last(x) * self.scale


class Skipping(Stack):
    """Leaves out blocks."""

    left_out: frozenset[int] = frozenset()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            x = x if i in self.left_out else block(x)
        return self.last(x)


@dataclass(frozen=True)
class Run:
    """One way to train: what is the same on one process and on many, and what is not."""

    partition: int = 4
    gpus_per_node: int = 2
    micro_steps: int = 3
    collectives: str = "auto"
    steps: int = 2  # the second has the weights, gradients and optimizer state that the first left
    optimizer: str = "sgd"
    clip: float | None = None
    model: dict[str, Any] = field(default_factory=dict)
    shard: dict[str, Any] = field(default_factory=dict)
    mp_policy: MixedPrecisionPolicy = field(default_factory=MixedPrecisionPolicy)


@dataclass
class Outcome:
    losses: list[float]
    weights: dict[str, torch.Tensor]
    norms: list[float]


def batches(run: Run, world: int) -> Iterator[torch.Tensor]:
    """One tensor per step, [micro-steps, world, rows, width]."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(run.steps):
        yield torch.randn(run.micro_steps, world, ROWS, WIDTH, generator=generator)


def device() -> torch.device:
    """Where this process trains: its accelerator, else the CPU."""
    return torch.device(default_device_type())


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return (output.float() ** 2).mean()


def make_optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    if run.optimizer == "sgd":
        return torch.optim.SGD(params, lr=0.05)
    return torch.optim.AdamW(params, lr=1e-2)


def train_alone(run: Run, world: int) -> Outcome:
    """One process, every micro-step on the concatenated batch of all ranks."""
    torch.manual_seed(0)
    model = Stack(**run.model).to(device())
    optimizer = make_optimizer(run, model)
    losses, norms = [], []
    for step in batches(run, world):
        total = 0.0
        for micro in step.to(device()):
            loss = loss_of(model(micro.reshape(-1, WIDTH))) / run.micro_steps
            loss.backward()
            total += loss.item()
        if run.clip is not None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), run.clip).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return Outcome(losses, {n: p.detach().cpu() for n, p in model.named_parameters()}, norms)


def train_sharded(run: Run) -> Outcome:
    """This rank's part of the same training with mics; ranks are seeded differently on purpose."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0 if rank == 0 else 1000 + rank)
    model = mics.shard(
        Stack(**run.model),
        mesh=mesh_of_rank(run.partition, run.gpus_per_node),
        collectives=run.collectives,
        mp_policy=run.mp_policy,
        **run.shard,
    )
    optimizer = make_optimizer(run, model)
    losses, norms = [], []
    for step in batches(run, world):
        total = torch.zeros((), device=device())
        mine = step[:, rank].to(device())
        for micro in mics.micro_steps(model, mine, normalise="micro_steps"):
            loss = loss_of(model(micro))
            loss.backward()
            total += loss.detach() / run.micro_steps
        if run.clip is not None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), run.clip)
            norms.append(norm.full_tensor().item())
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(total.item() / world)
    return Outcome(losses, whole_weights(model), norms)


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.full_tensor().detach().cpu() for name, p in model.named_parameters()}


def distance(ours: Outcome, reference: Outcome) -> float:
    """The largest relative difference of losses, norms and weights (of each tensor's largest)."""
    assert ours.weights.keys() == reference.weights.keys()
    pairs = [*zip(ours.losses, reference.losses, strict=True)]
    pairs += zip(ours.norms, reference.norms, strict=True)
    apart = [abs(a - b) / abs(b) for a, b in pairs]
    for name, weight in reference.weights.items():
        apart.append(((ours.weights[name] - weight).abs().max() / weight.abs().max()).item())
    return max(apart)


def identical(a: Outcome, b: Outcome) -> bool:
    return a.losses == b.losses and all(torch.equal(a.weights[n], b.weights[n]) for n in a.weights)


def quiet(function: Callable[[], Any]) -> Any:
    """Run without mics' announcements."""
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()):
        return function()
