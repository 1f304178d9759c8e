"""Parameters that are DTensors on a larger mesh: dp_mesh_dims, and tensor parallelism beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import errors_of_ranks, run_ranks
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

import mics

pytestmark = pytest.mark.skipif(
    not hasattr(fsdp, "DataParallelMeshDims"), reason="dp_mesh_dims came with torch 2.12"
)


def _gradients(fully_shard: Any, mesh: DeviceMesh) -> list[torch.Tensor]:
    everywhere = [Replicate(), Replicate()]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in model:
        for name, param in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(distribute_tensor(param.data, mesh, everywhere)))
    dims = fsdp.DataParallelMeshDims(shard="shard", replicate="replicate")
    for module in (*model, model):
        fully_shard(module, mesh=mesh, dp_mesh_dims=dims)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    output = model(DTensor.from_local(x, mesh, everywhere, run_check=False))
    (output**2).mean().to_local().backward()
    return [p.grad.full_tensor() for p in model.parameters()]


def _compare_with_torch() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for ours, theirs in zip(
        _gradients(mics.fully_shard, mesh), _gradients(torch_fully_shard, mesh), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_dp_mesh_dims_give_the_gradients_of_torch() -> None:
    run_ranks(_compare_with_torch, 4)


def _flattened() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    dims = fsdp.DataParallelMeshDims(shard=("a", "b"))
    mics.fully_shard(nn.Linear(4, 4), mesh=mesh, dp_mesh_dims=dims)


def test_axes_that_would_have_to_be_flattened_are_refused() -> None:
    for text in errors_of_ranks(_flattened, 4):
        assert "must name one shard axis and at most one replicate axis" in text
        assert "shard=('a', 'b')" in text
