"""Who holds which shard and who talks to whom."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mics
from mics.topology import Topology, has_two_stages, nodes_of, possible_partitions


def test_groups_inside_a_node() -> None:
    t = Topology(nodes=2, gpus_per_node=4, partition=2)
    assert t.world == 8 and t.replicas == 4 and t.nodes_per_partition == 1 and not t.spans_nodes
    assert t.partition_groups() == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert t.replication_groups() == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert t.intra_groups() == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert t.inter_groups() == []


def test_groups_of_one_node() -> None:
    t = Topology(nodes=2, gpus_per_node=4, partition=4)
    assert t.partition_groups() == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert t.replication_groups() == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert t.inter_groups() == []


def test_groups_over_nodes() -> None:
    t = Topology(nodes=4, gpus_per_node=2, partition=4)
    assert t.nodes_per_partition == 2 and t.replicas == 2 and t.spans_nodes
    assert t.partition_groups() == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert t.replication_groups() == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert t.intra_groups() == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert t.inter_groups() == [(0, 2), (1, 3), (4, 6), (5, 7)]


@pytest.mark.parametrize(("nodes", "k"), [(1, 1), (1, 8), (3, 4), (4, 6), (8, 8), (5, 1)])
def test_every_legal_partition_covers_the_world_exactly_once(nodes: int, k: int) -> None:
    for p in possible_partitions(nodes, k):
        t = Topology(nodes, k, p)
        everyone = list(range(t.world))
        for groups in (t.partition_groups(), t.replication_groups(), t.intra_groups()):
            assert sorted(r for g in groups for r in g) == everyone
        if t.spans_nodes:
            assert sorted(r for g in t.inter_groups() for r in g) == everyone
            assert {len(g) for g in t.inter_groups()} == {t.nodes_per_partition}
        assert all(len({t.node_of(r) for r in g}) == 1 for g in t.intra_groups())
        for rank in everyone:
            assert rank in t.partition_group_of(rank)
            assert rank in t.replication_group_of(rank)


def test_possible_partitions_divide_a_node_or_are_whole_nodes() -> None:
    assert possible_partitions(4, 8) == [1, 2, 4, 8, 16, 32]
    assert possible_partitions(6, 4) == [1, 2, 4, 8, 12, 24]
    assert possible_partitions(3, 6) == [1, 2, 3, 6, 18]


def test_two_stages_need_even_nodes_of_several_ranks() -> None:
    assert nodes_of((0, 1, 2, 3), 2) == [(0, 1), (2, 3)]
    assert has_two_stages((0, 1, 2, 3), 2)
    assert has_two_stages((0, 2, 4, 6), 4)  # every second rank: tensor parallel in between
    assert not has_two_stages((0, 1), 2)
    assert not has_two_stages((0, 2, 4), 2)  # one rank per node
    assert not has_two_stages((0, 1, 2), 2)  # uneven


@pytest.mark.parametrize(
    ("sizes", "what", "write"),
    [
        ((4, 8, 12), "partition = 12 does not divide the world size 32", "partition=8"),
        ((4, 8, 64), "partition = 64 is larger than the world of 32 rank(s)", "partition=32"),
        ((4, 8, 0), "partition = 0 must be at least 1", "partition=1"),
        ((4, 8, -2), "partition = -2 must be at least 1", "partition=1"),
        ((3, 6, 9), "partition = 9 is not a multiple of gpus_per_node = 6", "partition=6"),
        ((2, 6, 4), "partition = 4 does not divide gpus_per_node = 6", "partition=3"),
    ],
)
def test_illegal_partitions_name_the_possible_ones(
    sizes: tuple[int, int, int], what: str, write: str
) -> None:
    with pytest.raises(mics.TopologyError) as error:
        Topology(*sizes)
    message = str(error.value)
    assert what in message
    possible = " ".join(map(str, possible_partitions(*sizes[:2])))
    assert f"GPU(s): {possible}." in message
    assert f"Write: {write}" in message


def test_sizes_must_be_positive_integers() -> None:
    with pytest.raises(
        mics.TopologyError, match=r"partition must be an integer, got 2.0 \(float\)"
    ):
        Topology(1, 4, 2.0)  # type: ignore[arg-type]
    with pytest.raises(mics.TopologyError, match="partition must be an integer, got True"):
        Topology(1, 4, True)
    with pytest.raises(mics.TopologyError, match="nodes must be at least 1, got 0"):
        Topology(0, 4, 1)


def test_ragged_nodes_name_the_node_sizes_that_fit() -> None:
    with pytest.raises(mics.TopologyError) as error:
        Topology.from_world(12, 8, 4)
    assert "gpus_per_node = 8 does not divide the world of 12 rank(s)" in str(error.value)
    assert "Node sizes possible here: 1 2 3 4 6 12." in str(error.value)
    assert Topology.from_world(12, 4, 12).nodes == 3


def test_topology_and_traffic_do_not_import_torch() -> None:
    script = "import sys, mics.topology, mics.traffic; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-W", "error", "-c", script], check=False).returncode == 0
    )


def test_importing_mics_is_silent() -> None:
    script = (
        "import mics; mics.fully_shard, mics.shard, mics.micro_steps, mics.init_mesh, mics.ledger"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
