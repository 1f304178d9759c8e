"""The model of a case, its data and what is recorded of a step; for one process and for ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fuzzing.cases import Case, Shape, Uses

WIDTH = 5  # rows of every root parameter: 2, 2, 1 and none on four ranks

Named = dict[str, torch.Tensor | None]


class Interrupted(Exception):
    """What a case throws inside a micro-step."""


class Block(nn.Module):
    """Two experts of a width of its own and a norm; it runs those that a rank's data chose."""

    def __init__(self, inner: int, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.a, self.b = (
            nn.Sequential(nn.Linear(WIDTH, inner, bias), nn.Tanh(), nn.Linear(inner, WIDTH, bias))
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor, experts: str) -> torch.Tensor:
        y = self.norm(x)
        return x + sum((getattr(self, name)(y) for name in experts), torch.zeros(()))


class Net(nn.Module):
    """A first layer, blocks and a head, which may share the first layer's weight."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, shape.biases)
        self.blocks = nn.ModuleList(Block(inner, shape.biases) for inner in shape.inner)
        self.head = nn.Linear(WIDTH, WIDTH, shape.biases)
        if shape.tied:
            self.head.weight = self.first.weight
        self.repeats = shape.repeats

    def forward(self, x: torch.Tensor, uses: Uses, fails: bool = False) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        for i, block in enumerate(self.blocks):
            for _ in range(self.repeats[i] if i in uses else 0):
                x = block(x, uses[i])
        if fails:
            raise Interrupted
        return self.head(x)


@dataclass
class Record:
    """What one step is compared by."""

    gradients: Named | None = None  # None: the step was left
    norm: float | None = None
    outputs: list[torch.Tensor] = field(default_factory=list)  # of forwards without backward
    weights: Named = field(default_factory=dict)


def build(case: Case, seed: int = 0) -> Net:
    """The model of a case on one process, with values drawn from ``seed``."""
    torch.manual_seed(1000 * case.seed + seed)
    net = Net(case.shape)
    for prefix in case.shape.frozen:
        flip(net, prefix)
    return net


def flip(net: nn.Module, prefix: str) -> None:
    """Freeze the parameters whose names begin so, or train them again."""
    for name, param in net.named_parameters():
        if plain(name).startswith(prefix):
            param.requires_grad_(not param.requires_grad)


def plain(name: str) -> str:
    """A parameter's name without those of wrappers."""
    return name.replace("_checkpoint_wrapped_module.", "")


def batch(case: Case, step: int, micro_step: int, rank: int) -> torch.Tensor:
    """A rank's micro-batch; rows x width."""
    generator = torch.Generator().manual_seed(
        ((case.seed * 100 + step) * 10 + micro_step) * 10 + rank
    )
    return torch.randn(case.rows(step, micro_step, rank), WIDTH, generator=generator)


def peeked(case: Case, index: int, rank: int) -> torch.Tensor:
    """The data of a forward without backward; 3 rows on every rank."""
    generator = torch.Generator().manual_seed(100 * case.seed + 10 * index + rank)
    return torch.randn(3, WIDTH, generator=generator)


def loss_of(case: Case, step: int, output: torch.Tensor) -> torch.Tensor:
    """A sum over rows or a mean, divided by the micro-steps where nobody else divides."""
    squares = output.square().mean(1)
    one = case.steps[step]
    if one.normalise == "tokens":
        return squares.sum()
    return squares.mean() / (one.micro_steps if one.normalise is None else 1)


def optimizers_of(
    case: Case, net: nn.Module, of: Callable[[list[Any]], list[Any]] = list
) -> list[torch.optim.Optimizer]:
    """One optimizer of all parameters, or two that share them out.

    Args:
        case: it is of.
        net: its model.
        of: what is stepped of some parameters.
    """
    params = list(net.parameters())
    return [
        torch.optim.SGD(
            [{"params": of(params[i :: case.optimizers])}],
            **case.sgd | {"lr": case.sgd["lr"] / (i + 1)},
        )
        for i in range(case.optimizers)
    ]


def zero(net: nn.Module, optimizers: list[torch.optim.Optimizer], how: str) -> None:
    """Drop gradients in one of the ways there are, or keep them."""
    if how == "model":
        net.zero_grad()
    elif how != "kept":
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=how == "to none")
