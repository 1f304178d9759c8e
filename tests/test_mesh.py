"""The mesh, its groups, and what ranks must agree on before the first step."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import Run, Stack, quiet, train_sharded
from ranks import errors_of_ranks, run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import mics
from mics.ranks.mesh import groups_of, ranks_of, stage_groups


def _groups(partition: int, gpus_per_node: int) -> dict[str, Any]:
    mesh = mics.init_mesh(partition=partition, gpus_per_node=gpus_per_node)
    groups = groups_of(mesh)
    pair = stage_groups(groups, ranks_of(groups.shard))
    return {
        "names": mesh.mesh_dim_names,
        "shape": tuple(mesh.shape),
        "shard": ranks_of(groups.shard),
        "replicas": None if groups.replicas is None else ranks_of(groups.replicas),
        "inter": None if pair is None else ranks_of(pair.inter),
        "intra": None if pair is None else ranks_of(pair.intra),
    }


@pytest.mark.parametrize(("partition", "k"), [(1, 2), (2, 2), (4, 2), (8, 2), (2, 8), (8, 4)])
def test_process_groups_are_those_of_the_topology(partition: int, k: int) -> None:
    topology = mics.Topology.from_world(8, k, partition)
    for rank, seen in enumerate(run_ranks(_groups, 8, partition, k)):
        assert seen["names"] == ("replicate", "shard")
        assert seen["shape"] == (topology.replicas, partition)
        assert seen["shard"] == topology.partition_group_of(rank)
        replicas = topology.replication_group_of(rank)
        assert seen["replicas"] == (replicas if len(replicas) > 1 else None)
        if topology.spans_nodes:
            assert seen["inter"] in topology.inter_groups() and rank in seen["inter"]
            assert seen["intra"] in topology.intra_groups() and rank in seen["intra"]
        else:
            assert seen["inter"] is None and seen["intra"] is None


def _default_mesh() -> tuple[int, ...]:
    return tuple(mics.init_mesh().shape)


def test_auto_keeps_a_partition_group_inside_a_node() -> None:
    assert run_ranks(_default_mesh, 4, ranks_per_node=2) == [(2, 2)] * 4
    assert run_ranks(_default_mesh, 4) == [(1, 4)] * 4


# -- refused before anything hangs -----------------------------------------------------------------


def _init(**arguments: Any) -> None:
    mics.init_mesh(**arguments)


def _init_illegal() -> None:
    mics.init_mesh(partition=3, gpus_per_node=2)


def _init_ragged() -> None:
    mics.init_mesh(partition=1, gpus_per_node=3)


def test_an_illegal_partition_is_refused_on_every_rank() -> None:
    for text in errors_of_ranks(_init_illegal, 4):
        assert "partition = 3 does not divide the world size 4" in text
        assert "Partition sizes possible with 2 node(s) x 2 GPU(s): 1 2 4." in text
        assert "Write: partition=2" in text


def test_ragged_nodes_are_refused_on_every_rank() -> None:
    for text in errors_of_ranks(_init_ragged, 4):
        assert "gpus_per_node = 3 does not divide the world of 4 rank(s)" in text


def _disagree_on_partition() -> None:
    mics.init_mesh(partition=4 if dist.get_rank() == 2 else 2, gpus_per_node=2)


def test_ranks_that_disagree_on_the_partition_are_named() -> None:
    for text in errors_of_ranks(_disagree_on_partition, 4):
        assert "Ranks disagree on arguments of init_mesh: rank(s) 2 differ from rank 0" in text
        assert "rank 0 has 'partition=2', rank 2 has 'partition=4'" in text


def _disagree_on_version() -> None:
    import mics.ranks.mesh

    if dist.get_rank() == 3:
        mics.ranks.mesh.__version__ = "0.0.9"  # type: ignore[attr-defined]
    mics.init_mesh(partition=2)


def test_ranks_that_run_another_version_are_named() -> None:
    for text in errors_of_ranks(_disagree_on_version, 4):
        assert "Ranks disagree on version: rank(s) 3 differ from rank 0" in text
        assert "'mics 0.0.9'" in text


def _on_hosts(hosts: list[str]) -> None:
    socket.gethostname = lambda: hosts[dist.get_rank()]  # this rank's process only
    mics.init_mesh(partition=2, gpus_per_node=2)


def test_ranks_placed_round_robin_over_hosts_are_refused() -> None:
    for text in errors_of_ranks(_on_hosts, 4, ["a", "b", "a", "b"]):
        assert "ranks are not numbered node by node" in text
        assert "Their hosts are a, b (a: 2, b: 2)" in text
        assert "--distribution=block" in text


def test_hosts_with_different_numbers_of_ranks_are_refused() -> None:
    for text in errors_of_ranks(_on_hosts, 4, ["a", "a", "a", "b"]):
        assert "Nodes have different numbers of ranks" in text
        assert "Ranks per host: a: 3, b: 1" in text


def _without_launcher() -> None:
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name)
    mics.init_mesh(partition=1)


def test_a_process_without_a_launcher_is_told_how_to_start() -> None:
    (text,) = errors_of_ranks(_without_launcher, 1)
    assert "started by no launcher that mics knows" in text
    assert "Write: torchrun --nproc-per-node" in text


def _permuted(shape: list[list[int]]) -> None:
    mesh = DeviceMesh("cpu", torch.tensor(shape), mesh_dim_names=("replicate", "shard"))
    mics.fully_shard(nn.Linear(4, 4), mesh=mesh)


@pytest.mark.parametrize("shape", [[[1, 0], [3, 2]], [[2, 3], [0, 1]]])
def test_permuted_ranks_are_refused(shape: list[list[int]]) -> None:
    for text in errors_of_ranks(_permuted, 4, shape):
        assert "are not in ascending order" in text
        assert "The mesh says [" in text and "the process group [" in text
        assert "Write: mics.init_mesh(partition=...)" in text


def _three_axes() -> None:
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("a", "b", "c"))
    mics.fully_shard(nn.Linear(4, 4), mesh=mesh)


def test_a_mesh_of_three_axes_is_refused() -> None:
    for text in errors_of_ranks(_three_axes, 4):
        assert "The mesh has 3 axes" in text and "(1, 2, 2)" in text


def _outside_or_unnamed() -> None:
    part = DeviceMesh("cpu", [0, 1], mesh_dim_names=("shard",))
    unnamed = DeviceMesh("cpu", [[0, 1], [2, 3]])
    groups_of(part if dist.get_rank() > 1 else unnamed)


def test_a_rank_outside_its_mesh_and_a_mesh_without_names_are_refused() -> None:
    texts = errors_of_ranks(_outside_or_unnamed, 4)
    for text in texts[:2]:
        assert "A 2-D mesh needs names for its axes" in text
        assert 'mesh_dim_names=("replicate", "shard")' in text
    for rank, text in enumerate(texts[2:], start=2):
        assert f"Rank {rank} is not in the mesh it shards with" in text
        assert "The mesh holds ranks [0, 1]" in text


def _different_model(difference: str) -> None:
    odd = dist.get_rank() == 1
    blocks = [nn.Linear(4, 4) for _ in range(3 if odd and difference == "depth" else 2)]
    if odd and difference == "dtype":
        blocks[1] = blocks[1].to(torch.bfloat16)
    if odd and difference == "shape":
        blocks[1] = nn.Linear(4, 8)
    if odd and difference == "frozen":
        blocks[1].weight.requires_grad_(False)
    model = nn.Sequential(*blocks)
    if difference == "order":
        names = ["x", "y"] if not odd else ["y", "x"]
        model = nn.Sequential()
        for name, block in zip(names, blocks, strict=True):
            model.add_module(name, block)
    mics.shard(model, partition=2)


@pytest.mark.parametrize(
    ("difference", "entry"),
    [
        ("dtype", "'1.weight (4, 4) float32', rank 1 has '1.weight (4, 4) bfloat16'"),
        ("shape", "'1.weight (4, 4) float32', rank 1 has '1.weight (8, 4) float32'"),
        ("frozen", "'1.weight (4, 4) float32', rank 1 has '1.weight (4, 4) float32 frozen'"),
        ("order", "'x.weight (4, 4) float32', rank 1 has 'y.weight (4, 4) float32'"),
        ("depth", "nothing, rank 1 has '2.weight (4, 4) float32'"),
    ],
)
def test_ranks_that_disagree_on_the_model_are_named_with_the_parameter(
    difference: str, entry: str
) -> None:
    for text in errors_of_ranks(_different_model, 4, difference):
        assert "Ranks disagree on model: rank(s) 1 differ from rank 0" in text
        assert entry in text


def _disagree_on_arguments() -> None:
    mesh = mics.init_mesh(partition=4)
    mics.fully_shard(nn.Linear(4, 4), mesh=mesh, reshard_after_forward=dist.get_rank() != 3)


def test_ranks_that_disagree_on_sharding_arguments_are_named() -> None:
    for text in errors_of_ranks(_disagree_on_arguments, 4):
        assert "Ranks disagree on sharding arguments: rank(s) 3 differ from rank 0" in text
        assert "'reshard_after_forward=True', rank 3 has 'reshard_after_forward=False'" in text


def _stack(depth: int = 2) -> nn.Module:
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth)])


def _one_rank_differs(how: str) -> None:
    """Rank 1 would take another path, or raise, while the others wait for it."""
    odd = dist.get_rank() == 1
    if how == "model without blocks":
        mics.shard(nn.Linear(4, 4) if odd else _stack(), partition=2)
    if how == "model, partition chosen":
        mics.shard(_stack(3 if odd else 2))
    if how == "partition":
        mics.shard(_stack(), partition=2 if odd else "auto")
    if how == "blocks":
        mics.shard(_stack(), partition=2, blocks=[nn.Conv2d if odd else nn.Linear])
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("shard",))
    if how == "node size":
        mics.fully_shard(_stack(), mesh=mesh, gpus_per_node=1 if odd else 2)
    model = _stack()
    if how == "meta device" and odd:
        model[1].to("meta")
    if how == "buffers" and odd:
        model.register_buffer("scale", torch.ones(2))
    mics.fully_shard(model, mesh=mesh)


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("model without blocks", "Ranks disagree on model: rank(s) 1 differ"),
        ("model, partition chosen", "Ranks disagree on model: rank(s) 1 differ"),
        ("partition", "rank 0 has 'partition=auto', rank 1 has 'partition=2'"),
        ("blocks", "rank 0 has 'blocks=Linear', rank 1 has 'blocks=Conv2d'"),
        ("node size", "Ranks disagree on ranks per node: rank(s) 1 differ"),
        ("meta device", "on tensors on the meta device: rank(s) 1 differ"),
        ("buffers", "rank 0 has nothing, rank 1 has 'scale (2,) float32 buffer'"),
    ],
)
def test_one_rank_that_differs_leaves_no_other_waiting(how: str, what: str) -> None:
    for text in errors_of_ranks(_one_rank_differs, 4, how):
        assert what in text


def _launched_ragged(entrance: str) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "4" if dist.get_rank() < 4 else "2"
    if entrance == "init_mesh":
        mics.init_mesh(partition=2)
    else:
        mics.shard(_stack())


@pytest.mark.parametrize("entrance", ["init_mesh", "shard"])
def test_a_launch_of_unequal_nodes_is_refused_on_every_rank(entrance: str) -> None:
    for text in errors_of_ranks(_launched_ragged, 6, entrance):
        assert "Ranks disagree on ranks per node: rank(s) 4, 5 differ from rank 0" in text
        assert "rank 0 has '4', rank 4 has '2'" in text


def _other_gpus_per_node() -> None:
    mesh = mics.init_mesh(partition=4, gpus_per_node=2)
    mics.fully_shard(nn.Linear(4, 4), mesh=mesh, gpus_per_node=4)


def test_a_mesh_keeps_the_node_size_it_was_made_with() -> None:
    for text in errors_of_ranks(_other_gpus_per_node, 4):
        assert "set up with gpus_per_node = 2, now it is 4" in text


def _bad_reshard() -> None:
    mesh = mics.init_mesh(partition=4, gpus_per_node=2)
    mics.fully_shard(nn.Linear(4, 4), mesh=mesh, reshard_after_forward=3)


def test_resharding_to_a_size_that_does_not_divide_names_the_possible_ones() -> None:
    for text in errors_of_ranks(_bad_reshard, 4):
        assert "reshard_after_forward = 3 does not divide the partition group of 4" in text
        assert "Possible: 2, True and False" in text


def _bad_collectives() -> None:
    mesh = mics.init_mesh(partition=4, gpus_per_node=2)
    mics.fully_shard(nn.Linear(4, 4), mesh=mesh, collectives="fast")


def test_an_unknown_form_of_collectives_names_the_known_ones() -> None:
    for text in errors_of_ranks(_bad_collectives, 4):
        assert "collectives = 'fast' is not a choice" in text
        assert '"auto", "flat" or "hierarchical"' in text


def _reshard_groups() -> int:
    mesh = mics.init_mesh(partition=4, gpus_per_node=2)
    before = len(dist.distributed_c10d._world.pg_map)
    model = Stack(num_blocks=4)
    for block in model.blocks:
        mics.fully_shard(block, mesh=mesh, reshard_after_forward=2, collectives="flat")
    return len(dist.distributed_c10d._world.pg_map) - before


def test_resharding_to_fewer_ranks_makes_its_communicators_once_for_all_blocks() -> None:
    """FSDP2 makes two per block (pytorch#147179)."""
    assert run_ranks(_reshard_groups, 8) == [2] * 8


def _train_on(run: Run) -> list[float]:
    return quiet(lambda: train_sharded(run)).losses


def test_the_profile_is_read_again_and_says_the_same_everywhere(tmp_path: Any) -> None:
    os.environ["MICS_PROFILE"] = str(tmp_path / "profile.json")
    try:
        run = Run(4, 2, micro_steps=1, steps=1)
        first = run_ranks(_train_on, 8, run)
        written = (tmp_path / "profile.json").read_text()
        second = run_ranks(_train_on, 8, run)
        assert (tmp_path / "profile.json").read_text() == written, "it was measured again"
    finally:
        del os.environ["MICS_PROFILE"]
    assert len(set(map(str, first + second))) == 1


def _with_profile(text: str | None) -> None:
    path = os.environ["MICS_PROFILE"]
    if dist.get_rank() == 0 and text is not None:
        cluster = f"gloo on cpu, 4 ranks, 2 per node, torch {torch.__version__}"
        Path(path).write_text(text.replace("CLUSTER", cluster))
    if text is None:  # an account without a home folder, as in many containers
        for name in ("MICS_PROFILE", "XDG_CACHE_HOME", "HOME"):
            os.environ.pop(name, None)
        os.getuid = lambda: 2**30
    mesh = mics.init_mesh(partition=4, gpus_per_node=2)
    model = mics.fully_shard(nn.Linear(16, 16), mesh=mesh)
    model(torch.ones(1, 16)).sum().backward()
    assert mics.ledger(model).traffic() == mics.predict_traffic(model)


DAMAGED = [
    "{",
    "[]",
    '{"format": 1}',
    '{"format": 1, "clusters": []}',
    '{"format": 1, "clusters": {"CLUSTER": 1}}',
    '{"format": 1, "clusters": {"CLUSTER": {"all_gather 2 2 9 float32": {"form": "fast"}}}}',
    '{"format": 1, "clusters": {"CLUSTER": {"all_gather two 2 9 float32": {"form": "flat"}}}}',
    '{"format": 1, "clusters": {"CLUSTER": {"all_gather": {"form": "flat"}}}}',
]


@pytest.mark.parametrize("text", [*DAMAGED, None])
def test_a_damaged_or_missing_profile_stops_nobody(
    text: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # where the cache of an account without a home is
    run_ranks(_with_profile, 4, text)
