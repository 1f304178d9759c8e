"""Axes of a mesh that are not for data are refused, by their name or by who is on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import full, seeded
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.fsdp._fully_shard._fsdp_init import _get_mesh_info
from torch.distributed.tensor import Shard
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
            ("dp_replicate", "dp_shard_cp"),
            ("dp", "fsdp"),
            ("dp_replicate", "efsdp"),
            ("dp", "cp"),
            ("dp_shard_cp", "tp"),
            ("dp_shard_mod_ep", "dp_shard_in_ep"),
            ("data", "model"),
            ("dp_replicate", "dp_tp"),
            ("Context-Parallel", "shard"),
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
    names = ("dp_replicate", "ddp", "nodes", "dp_replicate", "dp", "dp_replicate")
    assert taken == [f"{name} {how}" for name in names for how in ("shard", "fully_shard")]


def test_one_axis_or_many_are_taken_by_name_or_refused_with_what_to_write():
    def told(names: tuple[str, ...]) -> str:
        mesh = init_device_mesh("cpu", (1,) * len(names), mesh_dim_names=names)
        texts = set()
        for shard in (mics.shard, mics.fully_shard):
            try:
                shard(_blocks(), mesh=mesh)
                texts.add("")
            except TopologyError as error:
                texts.add(str(error))
        (text,) = texts
        return text

    (found,) = run_ranks(lambda: {names: told(names) for names in WRITTEN}, 1)
    for names, written in WRITTEN.items():
        assert bool(found[names]) == bool(written)
        assert found[names].endswith(f"Write: {written}" if written else "")
        if len(names) == 1 and written:
            assert f"The axis {names[0]!r} of a mesh would be taken for (shard)" in found[names]
        if len(names) > 2:
            assert f"The mesh has {len(names)} axes; sharding needs 1 (shard) or 2" in found[names]


def _alone(written: str) -> str:
    return f'{written} if they see other data and hold the same parameters, else mesh["shard"]'


WRITTEN = {
    ("shard",): "",
    ("dp",): "",
    ("dp_shard_cp",): "",
    ("dp_cp",): "",
    ("gpus",): "",
    ("tp",): _alone('mesh["replicate", "shard"]'),
    ("ep",): _alone('mesh["replicate", "shard"]'),
    ("pp",): _alone('mesh["replicate", "shard"]'),
    ("cp",): _alone('mesh=mesh, dp_mesh_dims=DataParallelMeshDims(shard="cp")'),
    ("sp",): _alone('mesh=mesh, dp_mesh_dims=DataParallelMeshDims(shard="sp")'),
    ("replicate", "shard", "tp"): 'mesh["replicate", "shard"]',
    ("pp", "dp_shard", "tp"): 'mesh["dp_shard"]',
    ("pp", "dp_replicate", "dp_shard", "cp", "tp"): "mesh=mesh, dp_mesh_dims="
    'DataParallelMeshDims(shard=("dp_shard", "cp"), replicate="dp_replicate")',
    ("dp", "cp", "tp"): 'mesh=mesh, dp_mesh_dims=DataParallelMeshDims(shard=("dp", "cp"))',
    ("a", "b", "c"): 'mesh["replicate", "shard"]',
}


@pytest.mark.skipif(not hasattr(_fsdp_common, "ShardPlacementResult"), reason="torch 2.12")
def test_a_placement_on_an_axis_that_is_not_for_data_is_refused_by_name():
    def rank() -> list[str]:
        texts = []
        home = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
        for names in (("ep",), ("dp_shard", "cp"), ("tp",)):
            mesh = init_device_mesh("cpu", (1,) * len(names), mesh_dim_names=names)
            result = _fsdp_common.ShardPlacementResult(Shard(0), _get_mesh_info(mesh, None))
            with pytest.raises(TopologyError) as raised:
                mics.fully_shard(Block(), mesh=home, shard_placement_fn=lambda _, r=result: r)
            texts.append(str(raised.value))
        return texts

    (texts,) = run_ranks(rank, 1)
    assert "The axis 'ep' of a mesh would be taken for (shard)" in texts[0]
    assert "The axes ('dp_shard', 'cp') of a mesh would be taken for (replicate, sh" in texts[1]
    assert "The axis 'tp' of a mesh would be taken for (shard)" in texts[2]


def test_resharding_a_tensor_parallel_model_to_fewer_ranks_is_refused_before_the_first_forward():
    def rank() -> list[str]:
        mesh = init_device_mesh("cpu", (4, 1), mesh_dim_names=("shard", "tp"))
        texts = []
        for shard in (mics.shard, mics.fully_shard):
            model = _blocks()
            for block in model:
                plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(block, mesh["tp"], plan)
            with pytest.raises(ShardError) as raised:
                shard(model, mesh=mesh["shard"], reshard_after_forward=2)
            texts.append(str(raised.value))
            shard(model, mesh=mesh["shard"], reshard_after_forward=4)
        return texts

    for texts in run_ranks(rank, 4):
        for text in texts:
            assert "reshard_after_forward = 2 keeps parameters on fewer ranks" in text
            assert "0.up.weight is on ('tp',) of ranks" in text
            assert "the partition group has 4 ranks" in text
            assert "reshard_after_forward=True, or False" in text


def test_an_axis_of_other_tokens_that_is_left_out_is_refused():
    """Nobody would reduce the gradients over it; FSDP2 says nothing."""

    def rank() -> list[str]:
        texts = []
        for names in (("dp_shard", "cp"), ("dp_shard", "tp")):
            mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=names)
            model = _blocks()
            try:
                mics.shard(model, mesh=mesh["dp_shard"], mp_policy=FP32)
            except ShardError as error:
                texts.append(str(error))
            blocks = _blocks()
            for module in (*blocks, blocks):
                mics.fully_shard(module, mesh=mesh["dp_shard"])
            try:
                blocks(torch.ones(2, 8))
            except ShardError as error:
                texts.append(str(error))
        return texts

    for texts in run_ranks(rank, 2):
        assert len(texts) == 2
        for text in texts:
            assert "Ranks along 'cp' see other tokens of the same sequences" in text
            assert "has the axes ('dp_shard', 'cp') of (1, 2) ranks" in text
            assert 'Write: mesh=mesh, dp_mesh_dims=DataParallelMeshDims(shard=("dp_' in text


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
                'mics.shard(model, mesh=mesh["replicate", "shard"]) of the mesh with the axes '
                "('replicate', 'shard', 'tp')",
            ):
                assert word in str(raised.value)
        everywhere = init_device_mesh("cpu", (1, 4), mesh_dim_names=("replicate", "shard"))
        for shard in (mics.shard, mics.fully_shard):
            with pytest.raises(ShardError, match="would be taken for replicas or shards of it"):
                shard(model, mesh=everywhere)
        with torch.device("meta"):
            without_values = parallelize_module(Block(), mesh["tp"], plan)
        with pytest.raises(ShardError, match="made parallel on the meta device") as raised:
            mics.shard(nn.Sequential(without_values), mesh=mesh["replicate", "shard"])
        for word in ("up.weight is on ('tp',)", "a model with values before parallelize_module"):
            assert word in str(raised.value)
        torch.manual_seed(dist.get_rank())
        other = nn.Sequential(Block(), Block(), nn.Linear(8, 8))
        for block in other[:2]:
            parallelize_module(block, mesh["tp"], plan)
        mics.shard(other, mesh=mesh["replicate", "shard"], blocks=Block)
        torch.manual_seed(0)
        first = nn.Sequential(Block(), Block(), nn.Linear(8, 8))
        for ours, theirs in zip(other.parameters(), first.parameters(), strict=True):
            assert torch.equal(full(ours), theirs)
        mics.shard(model, mesh=mesh["replicate", "shard"], mp_policy=FP32)
        model(torch.ones(2, 8)).square().sum().backward()
        return [param.grad.full_tensor() for param in model.parameters()]

    alone = _blocks()
    alone(torch.ones(2, 8)).square().sum().backward()
    for gradients in run_ranks(rank, 4):
        for ours, param in zip(gradients, alone.parameters(), strict=True):
            torch.testing.assert_close(ours, param.grad, rtol=1e-5, atol=1e-5)
