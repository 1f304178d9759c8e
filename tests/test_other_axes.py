"""Axes of a mesh that are not for data are refused, by their name or by who is on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import seeded
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import mics
from mics.errors import ShardError, TopologyError

FP32 = MixedPrecisionPolicy()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.down = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def _blocks() -> Any:
    return seeded(lambda: nn.Sequential(Block(), Block()))


def test_the_axes_of_a_mesh_are_refused_by_name_where_they_are_not_replicate_and_shard():
    def rank() -> list[str]:
        taken = []
        for names in (
            ("dp_shard", "cp"),
            ("shard", "replicate"),
            ("fsdp", "ddp"),
            ("replicate", "tp"),
            ("pp", "shard"),
            ("dp_replicate", "dp_shard"),
            ("ddp", "fsdp"),
            ("nodes", "gpus"),
        ):
            mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=names)
            for shard in (mics.shard, mics.fully_shard):
                try:
                    shard(_blocks(), mesh=mesh)
                    taken.append(f"{names[0]} {shard.__name__}")
                except TopologyError as error:
                    assert f"The axes {names} of a mesh would be taken for" in str(error)
                    assert f"average over {names[0]!r}" in str(error)
                    assert 'mesh["replicate", "shard"]' in str(error)
        return taken

    (taken,) = run_ranks(rank, 1)
    names = ("dp_replicate", "ddp", "nodes")
    assert taken == [f"{name} {how}" for name in names for how in ("shard", "fully_shard")]


def test_a_tensor_parallel_model_is_refused_without_a_mesh_and_trains_on_the_right_one():
    def rank() -> list[torch.Tensor]:
        names = ("replicate", "shard", "tp")
        mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=names)
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        model = _blocks()
        for block in model:
            parallelize_module(block, mesh["tp"], plan)
        for partition in ("auto", 2):
            with pytest.raises(ShardError) as raised:
                mics.shard(model, partition=partition, mp_policy=FP32)
            for word in (
                "on a mesh of their own (tensor parallelism?)",
                "0.up.weight is on ('tp',) of ranks [",
                'mics.shard(model, mesh=mesh["replicate", "shard"])',
            ):
                assert word in str(raised.value)
        everywhere = init_device_mesh("cpu", (1, 4), mesh_dim_names=("replicate", "shard"))
        for shard in (mics.shard, mics.fully_shard):
            with pytest.raises(ShardError, match="would be taken for replicas or shards of it"):
                shard(model, mesh=everywhere)
        mics.shard(model, mesh=mesh["replicate", "shard"], mp_policy=FP32)
        model(torch.ones(2, 8)).square().sum().backward()
        return [param.grad.full_tensor() for param in model.parameters()]

    alone = _blocks()
    alone(torch.ones(2, 8)).square().sum().backward()
    for gradients in run_ranks(rank, 4):
        for ours, param in zip(gradients, alone.parameters(), strict=True):
            torch.testing.assert_close(ours, param.grad, rtol=1e-5, atol=1e-5)
