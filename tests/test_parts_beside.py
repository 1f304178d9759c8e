"""Experts in one tensor over an axis beside the data: used by some of its ranks, or by none."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import full
from parity import quiet
from ranks import mesh_of_rank, run_ranks
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import mics

WORLD, WIDTH, TOKENS, STEPS, EXPERTS = 4, 6, 5, 3, 4


class Experts(nn.Module):
    """Each its rows; one that gets none is not computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 3)

    def forward(self, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        parts = zip(rows.split(counts), weight.unbind(), strict=True)
        return torch.cat([rows[:0], *(part @ one for part, one in parts if len(part))])


class Net(nn.Module):
    def __init__(self, ep: DeviceMesh | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense, self.experts, self.ep = nn.Linear(WIDTH, WIDTH), Experts(), ep

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """All rows go to one expert."""
        rows = torch.tanh(self.dense(x))
        if self.ep is None:
            return x + self.experts(rows, [len(rows) * (e == expert) for e in range(EXPERTS)])
        own, group = EXPERTS // self.ep.size(), self.ep.get_group()
        to = [len(rows) * (rank == expert // own) for rank in range(self.ep.size())]
        mine = self.ep.get_local_rank() == expert // own
        came = [len(rows) * mine] * self.ep.size()
        got = all_to_all_single_autograd(rows, came, to, group)
        counts = [len(got) * (mine and e == expert % own) for e in range(own)]
        return x + all_to_all_single_autograd(self.experts(got, counts), to, came, group)


def _batch(step: int, rank: int) -> torch.Tensor:
    seed = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(TOKENS, WIDTH, generator=seed)


def _expert(step: int) -> int:
    return EXPERTS - 1 if step == 1 else 0


def _optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "momentum":
        params = model.parameters()
        return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    if isinstance(next(model.parameters()), DTensor):
        return mics.WholeStep(model.parameters(), torch.optim.Adafactor, lr=0.01)
    return torch.optim.Adafactor(model.parameters(), lr=0.01)


def _alone(kind: str) -> dict[str, torch.Tensor]:
    net = Net(None)
    optimizer = _optimizer(kind, net)
    for step in range(STEPS):
        for rank in range(WORLD):
            (net(_batch(step, rank), _expert(step)).square().mean() / WORLD).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in net.named_parameters()}


def _errors(kind: str, partition: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    net: Any = Net(mesh["ep"])
    spread = distribute_tensor(net.experts.weight.detach(), mesh["ep"], [Shard(0)])
    net.experts.weight = nn.Parameter(spread)
    full_precision = MixedPrecisionPolicy()
    mics.fully_shard(net.experts, mesh=mesh["efsdp"], mp_policy=full_precision)
    mics.fully_shard(net, mesh=mesh_of_rank(partition), mp_policy=full_precision)
    optimizer = _optimizer(kind, net)
    for step in range(STEPS):
        for batch in mics.micro_steps(net, [_batch(step, dist.get_rank())]):
            net(batch, _expert(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    right = _alone(kind)
    return [
        f"{kind}, p = {partition}: {name}"
        for name, param in net.named_parameters()
        if not torch.allclose(full(param), right[name], rtol=1e-5, atol=1e-6)
    ]


@pytest.mark.slow
def test_a_part_that_nobody_used_decays_with_the_part_beside_it_that_was_used() -> None:
    def all_errors() -> list[str]:
        cases = itertools.product(("momentum", "adamw", "whole"), (4, 2))
        return [error for case in cases for error in _errors(*case)]

    assert run_ranks(quiet, WORLD, all_errors) == [[]] * WORLD


def _norms() -> list[float]:
    """Of three models with experts; the second has a dense mesh that equals the first's."""
    found = []
    dense = mics.init_mesh(partition=2)
    for mesh in (dense, mics.init_mesh(partition=2), dense):
        over = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
        net: Any = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        net[1].weight = nn.Parameter(
            distribute_tensor(net[1].weight.detach(), over["ep"], [Shard(0)])
        )
        mics.fully_shard(net[1], mesh=over["efsdp"])
        mics.fully_shard(net, mesh=mesh)
        for layer in net:
            layer.weight.grad = torch.ones_like(layer.weight)
        found.append(float(mics.get_total_norm([layer.weight.grad for layer in net])))
    return found


def test_the_norm_of_experts_is_right_for_every_model_of_a_process() -> None:
    for norms in run_ranks(quiet, WORLD, _norms):
        assert norms == pytest.approx([32**0.5] * 3)
