"""Parameters that are DTensors on a larger mesh: dp_mesh_dims, and tensor parallelism beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import mics
from mics.errors import ShardError

pytestmark = pytest.mark.skipif(
    not hasattr(fsdp, "DataParallelMeshDims"), reason="dp_mesh_dims came with torch 2.12"
)


def _gradients(
    fully_shard: Any, mesh: DeviceMesh, dims: Any, split: bool
) -> tuple[list[torch.Tensor], list[str]]:
    """The gradients, and how the first parameter is spread.

    Args:
        fully_shard: ours or torch's.
        mesh: all parameters are on all of its axes.
        dims: the axes of the data.
        split: whether the input is one tensor spread over the ranks, so that gradients are partial
            sums over all axes; else each rank has an input of its own.
    """
    everywhere = [Replicate()] * mesh.ndim
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in model:
        for name, param in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(distribute_tensor(param.data, mesh, everywhere)))
    for module in (*model, model):
        fully_shard(module, mesh=mesh, dp_mesh_dims=dims)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    placements = [Shard(0)] * mesh.ndim if split else everywhere
    output = model(DTensor.from_local(x, mesh, placements, run_check=False))
    (output**2).mean().redistribute(placements=everywhere).to_local().backward()
    spread = f"{model[0].weight.placements} of {model[0].weight.device_mesh}"
    return [p.grad.full_tensor() for p in model.parameters()], [spread]


def _compare_with_torch() -> None:
    dims = fsdp.DataParallelMeshDims
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    three = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp_replicate", "dp_shard", "cp"))
    for mesh, named in (
        (two, dims(shard="shard", replicate="replicate")),
        (two, dims(shard=("replicate", "shard"))),
        (three, dims(shard=("dp_shard", "cp"), replicate="dp_replicate")),
        (three, dims(shard=("dp_shard", "cp"))),
        (three, dims(shard="cp", replicate=("dp_replicate", "dp_shard"))),
    ):
        for split in (False, True):
            ours, spread = _gradients(mics.fully_shard, mesh, named, split)
            theirs, alike = _gradients(torch_fully_shard, mesh, named, split)
            for mine, right in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, right)
            if named.replicate is None:
                assert spread == alike


@pytest.mark.slow
def test_dp_mesh_dims_give_the_gradients_of_torch_for_one_and_several_axes() -> None:
    run_ranks(_compare_with_torch, 4)


def test_wrong_names_in_dp_mesh_dims_are_refused() -> None:
    dims = fsdp.DataParallelMeshDims

    def rank() -> list[str]:
        names = ("dp_replicate", "dp_shard", "pp", "cp")
        mesh = init_device_mesh("cpu", (1, 1, 1, 1), mesh_dim_names=names)
        texts = []
        for wrong in (
            dims(replicate="dp_replicate"),
            dims(shard="dp_shard", replicate="dp_shard"),
            dims(shard="fsdp"),
            dims(shard=("cp", "dp_shard")),
        ):
            for shard in (mics.shard, mics.fully_shard):
                model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
                with pytest.raises(ShardError) as raised:
                    shard(model, mesh=mesh, dp_mesh_dims=wrong)
                assert f"It names shard={wrong.shard!r}, replicate={wrong.replicate!r}" in str(
                    raised.value
                )
                texts.append(str(raised.value))
        with pytest.raises(ShardError, match="names axes of a mesh, and no mesh was given"):
            mics.shard(model, dp_mesh_dims=dims(shard="dp_shard"))
        texts += _mixed(mesh)
        return texts

    (texts,) = run_ranks(rank, 1)
    for text, what in zip(
        texts,
        [
            *["names no axis to shard over"] * 2,
            *["names an axis twice"] * 2,
            *["names an axis that the mesh has not"] * 2,
            *["names axes in another order than that of the mesh"] * 2,
            "0.weight on ('dp_replicate', 'dp_shard', 'pp', 'cp'), 0.bias, 1.weight, 1.bias not",
            "can be sharded over axes side by side only",
        ],
        strict=True,
    ):
        assert what in text


def _mixed(mesh: DeviceMesh) -> list[str]:
    """What is said of one parameter on all axes beside plain ones, and of axes apart."""
    texts = []
    for together in (("weight",), ("weight", "bias")):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        for layer in model[: 1 if together == ("weight",) else 2]:
            for name in together:
                param = getattr(layer, name)
                over = distribute_tensor(param.data, mesh, [Replicate()] * mesh.ndim)
                setattr(layer, name, nn.Parameter(over))
        with pytest.raises(ShardError) as raised:
            dims = fsdp.DataParallelMeshDims(shard=("dp_shard", "cp"))
            mics.fully_shard(model, mesh=mesh, dp_mesh_dims=dims)
        texts.append(str(raised.value))
    return texts
