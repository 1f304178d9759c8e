"""Predicted bytes and messages, against values worked out by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest

from mics import traffic
from mics.topology import Topology, possible_partitions
from mics.traffic import Block, Flow, Key, Traffic, node_inter_bytes, ring_flow, stages

M = 2**20


def test_a_ring_sends_all_but_its_own_share_to_the_next_rank() -> None:
    group = (0, 1, 2, 3)
    inside = ring_flow("all_gather", group, 0, M, gpus_per_node=2)
    assert inside == Flow(intra_bytes=Fraction(3 * M, 4), intra_messages=3)
    leaving = ring_flow("all_gather", group, 1, M, gpus_per_node=2)  # 1 -> 2 crosses
    assert leaving == Flow(inter_bytes=Fraction(3 * M, 4), inter_messages=3)
    closing = ring_flow("reduce_scatter", group, 3, M, gpus_per_node=2)  # 3 -> 0 crosses
    assert closing.inter_bytes == Fraction(3 * M, 4)
    both = ring_flow("all_reduce", group, 0, M, gpus_per_node=4)
    assert both == Flow(intra_bytes=Fraction(6 * M, 4), intra_messages=6)
    assert ring_flow("all_gather", (5,), 5, M, gpus_per_node=4) == Flow()


def test_an_exchange_goes_to_its_addressees() -> None:
    """Of 4 ranks on 2 nodes each sends a quarter to one inside its node and to two outside."""
    group = (0, 1, 2, 3)
    row = Fraction(M, 4)
    for rank in group:
        assert traffic.exchange_flow(group, rank, M, gpus_per_node=2) == Flow(row, 2 * row, 1, 2)
    assert traffic.exchange_flow((0, 2), 2, M, gpus_per_node=2) == Flow(
        inter_bytes=Fraction(M, 2), inter_messages=1
    )
    assert traffic.exchange_flow((5,), 5, M, gpus_per_node=4) == Flow()


def test_hop_two_in_blocks_is_an_exchange_and_a_gather_beside_what_is_exact() -> None:
    """p = 1 on 2 nodes of one GPU: 40 bytes exact, 520 in blocks, of both half to the other."""
    block = Block(gather_bytes=4, reduce_bytes=4, sync_bytes=40, coded_bytes=520)
    hop_2 = {
        key.collective: count
        for key, count in traffic.mics(Topology(2, 1, 1), [block], 4).counts.items()
        if key.hop == 2
    }
    assert {name: count.flow.inter_bytes for name, count in hop_2.items()} == {
        "all_reduce": 40,
        "all_to_all": 260,
        "all_gather": 260,
    }
    assert all(count.calls == 1 for count in hop_2.values())


def test_hierarchical_stages_of_the_papers_example() -> None:
    """Two nodes of two GPUs: the volume over the slow link falls from 3/4 to 1/2 (MiCS blog)."""
    group, per_rank = (0, 1, 2, 3), {}
    for form in ("flat", "hierarchical"):
        per_rank[form] = [
            Traffic({Key(1, "all_gather", m.stage): traffic.Count(1, m.message_bytes, flow)})
            for rank in (0, 1)
            for m in stages(group, rank, M, 2, form)  # type: ignore[arg-type]
            for flow in [traffic.stage_flow("all_gather", m, rank, 2)]
        ]
    assert node_inter_bytes(per_rank["flat"]) == Fraction(3 * M, 4)
    assert node_inter_bytes(per_rank["hierarchical"]) == Fraction(M, 2)


@pytest.mark.parametrize(("n", "k"), [(2, 2), (2, 8), (4, 8), (8, 8), (3, 5)])
def test_hierarchical_over_flat_between_nodes_is_p_minus_k_over_p_minus_1(n: int, k: int) -> None:
    p = n * k
    block = Block(gather_bytes=p * 1000, reduce_bytes=p * 1000, sync_bytes=1000)
    topology = Topology(nodes=n, gpus_per_node=k, partition=p)
    into_node = {}
    for form in ("flat", "hierarchical"):
        ranks = range(k)  # the first node
        into_node[form] = node_inter_bytes(
            [
                traffic.mics(topology, [block], 1, all_gather=form, reduce_scatter=form, rank=r)
                for r in ranks
            ]
        )
    assert into_node["flat"] == 3 * block.gather_bytes * Fraction(p - 1, p)
    assert into_node["hierarchical"] == 3 * block.gather_bytes * Fraction(p - k, p)
    assert into_node["hierarchical"] / into_node["flat"] == Fraction(p - k, p - 1)


def test_one_step_of_mics_by_hand() -> None:
    """s (2 all-gathers + 1 reduce-scatter) inside the group, 2 (R - 1)/R of the shard once."""
    topology = Topology(nodes=4, gpus_per_node=2, partition=2)
    block = Block(gather_bytes=2 * 600, reduce_bytes=2 * 1200, sync_bytes=1200)
    step = traffic.mics(topology, [block, block], micro_steps=5)
    gathered, reduced = 5 * 2 * 2 * 600, 5 * 2 * 1200
    assert step.hop(1) == Flow(intra_bytes=Fraction(gathered + reduced), intra_messages=5 * 2 * 3)
    assert step.hop(2) == Flow(inter_bytes=Fraction(2 * 2 * 3 * 1200, 4), inter_messages=2 * 2 * 3)
    assert step.counts[Key(1, "all_gather", "flat")].calls == 20
    assert step.counts[Key(2, "all_reduce", "flat")].calls == 2


def test_the_alternative_schedule_repeats_hop_2() -> None:
    topology = Topology(nodes=4, gpus_per_node=2, partition=2)
    blocks = [Block(800, 800, 400)]
    deferred = traffic.hsdp(topology, blocks, 4, deferred=True)
    every = traffic.hsdp(topology, blocks, 4, deferred=False)
    assert every.hop(2).inter_bytes == 4 * deferred.hop(2).inter_bytes
    assert every.hop(1) == deferred.hop(1)
    assert traffic.hsdp(topology, blocks, 1, deferred=True) == traffic.hsdp(
        topology, blocks, 1, deferred=False
    )


def test_mics_over_the_whole_world_is_zero_3_and_over_one_rank_is_ddp() -> None:
    blocks = [Block(1600, 3200, 0), Block(160, 320, 0)]
    for rank in range(8):
        whole = Topology(2, 4, 8)
        assert traffic.mics(
            whole, blocks, 3, all_gather="flat", reduce_scatter="flat", rank=rank
        ) == traffic.fsdp(Topology(2, 4, 2), blocks, 3, rank=rank)
        alone = [Block(b.gather_bytes, b.reduce_bytes, b.reduce_bytes) for b in blocks]
        assert traffic.mics(Topology(2, 4, 1), alone, 3, rank=rank) == traffic.ddp(
            Topology(2, 4, 4), blocks, 3, deferred=True, rank=rank
        )


def test_deferring_ddp_divides_its_traffic_by_the_micro_steps() -> None:
    once = traffic.ddp(Topology(2, 4, 1), [Block(0, 8000, 0)], 4, deferred=True)
    every = traffic.ddp(Topology(2, 4, 1), [Block(0, 8000, 0)], 4, deferred=False)
    assert every.flow.intra_bytes == 4 * once.flow.intra_bytes
    assert once.flow.intra_bytes == 2 * Fraction(7 * 8000, 8)


def test_every_byte_sent_is_received_once() -> None:
    """Summed over ranks, a collective moves (n - 1) M (twice that for all-reduce), any form."""
    for p in possible_partitions(4, 2):
        topology = Topology(4, 2, p)
        block = Block(gather_bytes=p * 16, reduce_bytes=p * 16, sync_bytes=16, gathers=1)
        for form in ("flat", "hierarchical"):
            flows = [
                traffic.mics(
                    topology, [block], 1, all_gather=form, reduce_scatter=form, rank=r
                ).hop(1)
                for r in range(8)
            ]
            sent = sum(f.intra_bytes + f.inter_bytes for f in flows)
            assert sent == 2 * topology.replicas * (p - 1) * p * 16


def test_frozen_blocks_are_gathered_but_not_reduced() -> None:
    step = traffic.mics(Topology(2, 2, 2), [Block(64, 0, 0, reduces=0)], 3)
    assert list(step.counts) == [Key(1, "all_gather", "flat")]


def test_a_smaller_group_in_backward_keeps_its_gathers_inside() -> None:
    topology = Topology(2, 2, 4)
    block = Block(64, 64, 16, gathers=1, backward_gathers=1, backward_partition=2)
    step = traffic.mics(topology, [block], 1)
    assert step.counts[Key(1, "all_gather", "inter")].calls == 1
    assert step.counts[Key(1, "all_gather", "flat")].flow == Flow(Fraction(32), Fraction(0), 1, 0)


def test_traffic_is_printed_as_a_table_of_calls_and_bytes() -> None:
    flow = Flow(intra_bytes=Fraction(3 * M, 4), inter_bytes=Fraction(5, 2), intra_messages=3)
    table = Traffic(
        {
            Key(2, "all_reduce", "flat"): traffic.Count(1, 8, Flow(inter_bytes=Fraction(8))),
            Key(1, "all_gather", "flat"): traffic.Count(12, M, flow),
        }
    )
    assert str(table).splitlines() == [
        "hop collective      stage    calls      bytes intra            inter",
        "1   all_gather      flat        12          786,432                2",
        "2   all_reduce      flat         1                0                8",
    ]
