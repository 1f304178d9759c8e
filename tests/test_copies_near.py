"""Copies that differ by rounding are alike, and along two axes those who see none are told too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from parity import quiet
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import mics
from mics.errors import MicroStepError

WIDTH = 8

# -- rounding ------------------------------------------------------------------------------------


class Gated(nn.Module):
    """A stream that begins as zeros, with a gate, of which ranks have other roundings."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.zeros(64, WIDTH))
        self.gate = nn.Parameter(torch.zeros(1))
        self.rounding = 0.0
        self.drawn = torch.Generator().manual_seed(dist.get_rank())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(torch.relu(self.up(x))) * (1 + self.gate) + self.bias
        x.register_hook(self.round)
        return x

    def round(self, gradient: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(gradient.shape, generator=self.drawn)
        return gradient + self.rounding * gradient.square().mean().sqrt() * noise


def _rounded(rounding: float, make: Callable[..., torch.optim.Optimizer], scale: float) -> float:
    mesh = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("replicate", "shard", "tp"))
    torch.manual_seed(0)
    net = Gated()
    parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    mics.fully_shard(net, mesh=mesh["replicate", "shard"])
    net.rounding = rounding
    optimizer = make(net.parameters())
    for step in range(40):
        drawn = torch.Generator().manual_seed(step)
        x, y = torch.randn(2, 64, WIDTH, generator=drawn).unbind()
        for _ in mics.micro_steps(net, [None]):
            ((net(x) - 10 * y).square().mean() * scale).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.bias.full_tensor().norm().item()


def test_copies_whose_gradients_are_rounded_otherwise_are_alike() -> None:
    """With Adam, which makes a whole step of what is next to nothing, and gradients of one value,
    that are next to nothing now and then; with squares that 32 bits do not hold."""

    def rank() -> None:
        _rounded(2e-3, lambda params: torch.optim.AdamW(params, lr=1e-2), 1.0)
        _rounded(5e-3, lambda params: torch.optim.SGD(params, lr=1e-2), 1.0)
        _rounded(2e-3, lambda params: torch.optim.SGD(params, lr=1e-1), 1e-24)

    run_ranks(quiet, 2, rank)


def test_a_copy_of_one_value_with_other_gradients_is_refused_after_some_steps() -> None:
    def rank() -> str:
        with pytest.raises(MicroStepError) as raised:
            _rounded(3.0, lambda params: torch.optim.SGD(list(params)[1:2], lr=1e-5), 1.0)
        return str(raised.value)

    for text in run_ranks(quiet, 2, rank):
        assert "have a copy of gate each, and" in text and "50%" in text


# -- two axes ------------------------------------------------------------------------------------


class Spread(nn.Module):
    """A matrix that is spread over two axes, and a norm of which all ranks have a copy."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        parts = DTensor.from_local(torch.ones(4, 4), mesh["ep", "tp"], [Shard(0), Shard(1)])
        self.matrix, self.norm = nn.Parameter(parts), nn.Parameter(torch.ones(4))
        self.uses = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm * x
        return x @ self.matrix.to_local() if self.uses else x


def _spread() -> Spread:
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("shard", "ep", "tp"))
    return mics.fully_shard(Spread(mesh), mesh=mesh["shard"])


def _one_step(net: nn.Module) -> None:
    for batch in mics.micro_steps(net, [torch.ones(2, 4)]):
        net(batch).sum().backward()


def test_copies_along_two_axes_are_refused_on_ranks_that_share_none_with_the_odd_one() -> None:
    def rank() -> str:
        net = _spread()
        with torch.no_grad():
            net.norm.mul_(1 + (dist.get_rank() == 3))
        with pytest.raises(MicroStepError) as raised:
            _one_step(net)
        return str(raised.value)

    said = run_ranks(quiet, 4, rank)
    assert "Ranks along 'ep' and 'tp' have a copy of norm each, and their values differ" in said[0]
    assert all(len(text.splitlines()) == 3 for text in said)


@pytest.mark.parametrize("user", range(4))
def test_what_one_rank_along_two_axes_has_used_is_used_on_all(user: int) -> None:
    def rank() -> bool:
        net = _spread()
        net.uses = dist.get_rank() == user
        _one_step(net)
        return net.matrix.grad is not None

    assert run_ranks(quiet, 4, rank) == [True] * 4
