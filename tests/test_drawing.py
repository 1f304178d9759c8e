"""Text that shows a topology as it is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mics.ranks.drawing import draw, group_map, group_text, node_map, ranks_text
from mics.topology import Topology, possible_partitions


def test_partition_over_nodes_is_drawn_with_its_stages() -> None:
    assert group_map(Topology(4, 2, 4)).split("\n") == [
        "Group map: partition 4, 2 replicas (row = partition group, column = replication group)",
        "      shard  0 1 | 2 3",
        "  replica 0  0 1 | 2 3  nodes 0-1",
        "  replica 1  4 5 | 6 7  nodes 2-3",
        "",
        "  hop 1, partition groups    2 of 4 ranks: {0 1 2 3} {4 5 6 7}",
        "    inter stage              4 of 2 ranks: {0 2} {1 3} {4 6} {5 7}",
        "    intra stage              4 of 2 ranks: {0 1} {2 3} {4 5} {6 7}",
        "  hop 2, replication groups  4 of 2 ranks: {0 4} {1 5} {2 6} {3 7}",
    ]


def test_partition_inside_a_node_has_no_stages() -> None:
    text = group_map(Topology(2, 4, 2))
    assert "stage" not in text
    assert "  replica 1  2 3  node 0\n  replica 2  4 5  node 1\n" in text


def test_one_rank_per_node_has_no_stages() -> None:
    text = group_map(Topology(4, 1, 2))
    assert "stage" not in text
    assert "  replica 1  2 | 3  nodes 2-3\n" in text


def test_single_replica_and_partition_of_one_are_called_so() -> None:
    assert "hop 2, replication groups  none: one replica" in group_map(Topology(2, 2, 4))
    assert "none: every rank holds a whole replica" in group_map(Topology(2, 2, 1))


def test_node_map_names_the_host_of_each_node() -> None:
    hosts = ["alpha", "alpha", "be", "be"]
    assert node_map(Topology(2, 2, 2), hosts=hosts).split("\n") == [
        "Node map: 2 nodes x 2 ranks = 4",
        "  node 0  alpha  0 1",
        "  node 1  be     2 3",
    ]


def test_what_is_left_out_is_counted() -> None:
    lines = node_map(Topology(64, 8, 8), most=4).split("\n")
    assert len(lines) == 1 + 2 + 1 + 1
    assert lines[3] == "  ... 61 nodes left out"
    assert lines[4].startswith("  node 63  504 ")
    rows = group_map(Topology(64, 8, 128), most=3).split("\n")
    assert ".. 14 nodes .." in rows[2]
    assert rows[3] == "  ... 2 replicas left out"


@pytest.mark.parametrize(("nodes", "k"), [(1, 1), (4, 2), (1, 8), (64, 8), (3, 5), (1000, 8)])
def test_every_layout_stays_compact(nodes: int, k: int) -> None:
    for p in possible_partitions(nodes, k):
        text = draw(Topology(nodes, k, p))
        assert text.isascii()
        assert max(map(len, text.split("\n"))) <= 130
        assert len(text.split("\n")) <= 28


def test_every_rank_of_a_small_cluster_is_drawn_once_per_map() -> None:
    topology = Topology(2, 4, 8)
    assert node_map(topology).split("\n")[1:] == ["  node 0  0 1 2 3", "  node 1  4 5 6 7"]
    assert "  replica 0  0 1 2 3 | 4 5 6 7  nodes 0-1" in group_map(topology)


def test_long_groups_are_runs_or_cut() -> None:
    assert group_text((0, 2, 4, 6)) == "{0 2 4 6}"
    assert group_text(range(8, 16)) == "{8-15}"
    assert group_text(range(0, 512, 8)) == "{0 8 .. 504}"
    assert ranks_text([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_drawing_needs_no_torch() -> None:
    code = "import sys, mics.ranks.drawing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
