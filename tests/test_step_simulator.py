"""A step, event by event: what hides, what waits, and the properties every engine must have."""

from __future__ import annotations

import dataclasses
import math
import random
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics import traffic
from mics.anatomy.anatomy import Anatomy
from mics.anatomy.recipe import Machine, Recipe
from mics.anatomy.trace import Operator, Segment, Trace
from mics.communication.joined import joined
from mics.hardware.cluster import Cluster, Gpu
from mics.hardware.lookup import find_gpu, find_node
from mics.hardware.network import Stage
from mics.models.building import build, load_config
from mics.planning.subject import subject
from mics.simulation.compute import Times, times
from mics.simulation.engine_step import inter_bytes, simulate_engine
from mics.simulation.profiles import PROFILES
from mics.simulation.schedule import Schedule, UnitSeconds
from mics.simulation.step import Step, simulate, straggling
from mics.simulation.timeline import chrome_trace
from mics.topology import Topology

BLOCKS = 4
NONE = UnitSeconds(0.0, 0.0)


def inter(seconds: float) -> tuple[Stage, ...]:
    return (Stage("inter", seconds),)


def run(block: UnitSeconds, **schedule: Any) -> Step:
    return simulate([block] * BLOCKS, NONE, Schedule(**schedule))


def test_without_communication_a_step_is_its_computation() -> None:
    step = run(UnitSeconds(1.0, 2.0), micro_steps=5, last=0.5)
    assert step.seconds == pytest.approx(5 * BLOCKS * 3.0 + 0.5)
    assert step.compute == pytest.approx(5 * BLOCKS * 3.0)
    assert step.exposed == {0: 0.5, 1: 0.0, 2: 0.0, 3: 0.0}


def test_a_copy_to_the_host_that_is_shorter_than_a_block_is_hidden() -> None:
    step = run(UnitSeconds(1.0, 2.0, copy=1.0), micro_steps=3)
    assert step.exposed[3] == 0.0
    assert step.seconds == pytest.approx(3 * BLOCKS * 3.0)
    assert step.total[3] == pytest.approx(3 * (BLOCKS + BLOCKS - 1))


def test_a_longer_one_is_waited_for_after_the_next_block_and_before_its_own_backward() -> None:
    # Blocks 1 to 3 wait 0.5 for the copy of the one before: it began when theirs did. Backward
    # computes 2.0, and waits 0.5 for a copy of 2.5.
    step = run(UnitSeconds(1.0, 2.0, copy=1.5), micro_steps=3)
    assert step.exposed[3] == pytest.approx(3 * 3 * 0.5)
    step = run(UnitSeconds(4.0, 2.0, copy=2.5), micro_steps=3)
    assert step.exposed[3] == pytest.approx(3 * 3 * 0.5)
    assert "waiting for the host" in str(step)


def test_what_is_not_prefetched_is_waited_for() -> None:
    block = UnitSeconds(1.0, 2.0, inter(0.5), inter(0.25))
    step = run(block, prefetch=0, in_flight=0)
    assert step.seconds == pytest.approx(BLOCKS * (3.0 + 2 * 0.5 + 0.25))
    assert step.exposed[1] == pytest.approx(BLOCKS * 1.25)
    assert step.total[1] == pytest.approx(BLOCKS * 1.25)


def test_a_prefetched_gather_hides_behind_computation() -> None:
    block = UnitSeconds(1.0, 2.0, inter(0.5))
    step = run(block)
    # Only the first gather of each pass has nothing to hide behind.
    assert step.exposed[1] == pytest.approx(2 * 0.5)


def test_a_link_that_cannot_keep_up_sets_the_pace() -> None:
    step = run(UnitSeconds(1.0, 2.0, inter(5.0)))
    assert step.seconds == pytest.approx(2 * BLOCKS * 5.0 + 1.0 + 2.0)


def test_reductions_are_waited_for_when_the_backward_pass_ends() -> None:
    step = run(UnitSeconds(1.0, 2.0, reduce=inter(0.5)), micro_steps=3)
    assert step.exposed[1] == pytest.approx(3 * 0.5)  # of each micro-step the last block's


def test_the_next_gather_goes_before_the_reduction() -> None:
    """The other way round the gather of a block waits for the block before it to be reduced."""
    gather, reduce = 1.0, 1.5
    step = run(UnitSeconds(3.0, 3.0, inter(gather), inter(reduce)))
    # In 3.0 of computation a gather and a reduction fit, if nobody waits for the wrong one.
    assert step.seconds == pytest.approx(2 * gather + BLOCKS * 6.0 + reduce)


def test_two_stages_run_beside_each_other_when_pipelined() -> None:
    gather = (Stage("inter", 2.0), Stage("intra", 2.0))
    one_by_one = run(UnitSeconds(0.0, 0.0, gather), prefetch=2)
    pipelined = run(UnitSeconds(0.0, 0.0, gather), prefetch=2, pipelined=True)
    assert one_by_one.seconds == pytest.approx(2 * BLOCKS * 4.0)
    # By hand, each pass: the first gather 4, then one every 2, and one more 2 for the third, which
    # is issued when the second is waited for.
    assert pipelined.seconds == pytest.approx(2 * 12.0)


def test_hop_2_hides_behind_the_last_backward_only() -> None:
    block = UnitSeconds(1.0, 2.0, sync=inter(0.5))
    for micro_steps in (1, 2, 4, 7):
        deferred = run(block, micro_steps=micro_steps)
        assert deferred.exposed[2] == pytest.approx(0.5)  # the last block's
        assert deferred.total[2] == pytest.approx(BLOCKS * 0.5)


@pytest.mark.parametrize("micro_steps", [1, 2, 3, 4, 8, 16])
def test_hop_2_of_every_micro_step_is_waited_for_in_each(micro_steps: int) -> None:
    """FSDP2 ends a backward pass when its all-reduces have landed."""
    short = run(UnitSeconds(1.0, 2.0, sync=inter(0.5)), micro_steps=micro_steps, sync="every")
    assert short.exposed[2] == pytest.approx(micro_steps * 0.5)
    assert short.total[2] == pytest.approx(micro_steps * BLOCKS * 0.5)
    # A link that cannot keep up: four messages of 3.0 behind the first block's backward.
    long = run(UnitSeconds(1.0, 2.0, sync=inter(3.0)), micro_steps=micro_steps, sync="every")
    assert long.seconds == pytest.approx(micro_steps * (BLOCKS * 1.0 + 2.0 + BLOCKS * 3.0))


@pytest.mark.parametrize("sync", ["last", "every", "never"])
def test_more_micro_steps_cost_the_same_each(sync: Any) -> None:
    block = UnitSeconds(1.0, 2.0, inter(0.7), inter(0.9), inter(2.5))
    spent = [run(block, micro_steps=s, sync=sync).seconds for s in range(2, 9)]
    more = [b - a for a, b in pairwise(spent)]
    assert more == pytest.approx([more[0]] * len(more))


def test_messages_cost_the_host() -> None:
    block = UnitSeconds(1.0, 2.0, inter(0.1))
    free, paid = run(block), run(block, host=0.01, messages=12)
    assert paid.compute - free.compute == pytest.approx(2 * BLOCKS * 0.12)


@pytest.mark.parametrize("sync", ["last", "every", "never"])
def test_a_timeline_is_of_every_micro_step(sync: Any) -> None:
    block = UnitSeconds(1.0, 2.0, inter(0.5), inter(0.25), inter(2.2))
    schedule = Schedule(micro_steps=7, sync=sync)
    long = simulate([block] * BLOCKS, NONE, schedule, timeline=True)
    assert sum(span.stream == "compute" for span in long.timeline) == 7 * (2 * BLOCKS + 2)
    short = simulate([block] * BLOCKS, NONE, schedule)
    assert long.seconds == pytest.approx(short.seconds)
    assert long.exposed == pytest.approx(short.exposed)


def test_a_timeline_holds_every_span() -> None:
    block = UnitSeconds(1.0, 2.0, inter(0.5), inter(0.25), inter(0.2))
    step = simulate([block] * BLOCKS, NONE, Schedule(), timeline=True)
    by_stream = {
        name: [s for s in step.timeline if s.stream == name] for name in ("hop 1", "hop 2")
    }
    assert len(by_stream["hop 1"]) == BLOCKS * 3
    assert len(by_stream["hop 2"]) == BLOCKS
    for spans in by_stream.values():  # a stream does one thing at a time
        for a, b in pairwise(spans):
            assert a.end <= b.start + 1e-12
    assert max(span.end for span in step.timeline) == pytest.approx(step.seconds)
    events = chrome_trace(step.timeline)["traceEvents"]
    assert isinstance(events, list)
    assert sum(event["ph"] == "X" for event in events) == len(step.timeline)


def test_somebody_is_always_late() -> None:
    assert straggling(0.0, 512, 64, 4) == 1.0
    assert straggling(0.02, 1, 1, 1) == 1.0
    assert straggling(0.02, 8, 1, 1) == pytest.approx(1 + 0.02 * 1.4236, rel=2e-3)  # tables: 1.4236
    assert straggling(0.02, 8, 64, 4) < straggling(0.02, 512, 1, 4)  # averages over micro-steps


def test_lateness_counts_once_however_gpus_are_divided() -> None:
    """With one micro-step all wait for the latest GPU of all; with more, small groups win."""
    sizes = [2**n for n in range(11)]
    alone = [straggling(0.02, p, 1024 // p, 1) for p in sizes]
    assert alone == pytest.approx([straggling(0.02, 1024, 1, 1)] * len(sizes))
    for micro_steps in (2, 4, 64):
        late = [straggling(0.02, p, 1024 // p, micro_steps) for p in sizes]
        assert late == sorted(late)
        assert late[0] < late[-1]


@pytest.mark.parametrize("p", [1, 8, 64])
def test_lateness_is_what_drawn_gpus_are_late(p: int) -> None:
    """Draw every micro-step of 64 GPUs, 4 micro-steps a step, and wait as the groups do."""
    draw, steps = random.Random(1), 400
    late = 0.0
    for _ in range(steps):
        of_replicas = [
            sum(max(draw.gauss(0, 1) for _ in range(p)) for _ in range(4)) / 4
            for _ in range(64 // p)
        ]
        late += max(of_replicas) / steps
    assert straggling(1.0, p, 64 // p, 4) - 1 == pytest.approx(late, rel=0.05)


# -- computation ---------------------------------------------------------------------------------

CHIP = Gpu("chip", 1e9, peak=1e12, bandwidth=1e11, achieved=5e11)


def one_kernel(flops: int, num_bytes: int) -> Trace:
    kernel = (Operator(flops, num_bytes),)
    segments = (
        Segment(0, "forward", 0, 0, 0, 0, kernel),
        Segment(0, "backward", 0, 0, 0, 0, kernel),
    )
    return Trace(segments, (0,))


def test_a_kernel_takes_the_larger_of_product_and_memory() -> None:
    product = times(one_kernel(200_000_000_000, 8), CHIP)
    assert product.forward[0] == pytest.approx(
        200e9 / 5e11, rel=1e-4
    )  # capped by what was achieved
    memory = times(one_kernel(0, 1_000_000_000), CHIP)
    assert memory.forward[0] == pytest.approx(1e9 / (0.9 * 1e11), rel=1e-3)
    small = times(one_kernel(1_000_000, 8), CHIP)
    assert small.forward[0] > 1_000_000 / 2e11  # a small one does not fill the chip


def test_checkpointing_computes_forward_again() -> None:
    made = one_kernel(200_000_000_000, 8)
    plain, again = times(made, CHIP), times(made, CHIP, checkpointing=True)
    assert again.backward[0] == pytest.approx(plain.backward[0] + plain.forward[0])
    assert times(made, CHIP, stack=0.5).total == pytest.approx(2 * plain.total)


# -- engines -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return subject("gpt2-tiny")


@pytest.fixture(scope="module")
def made(anatomy: Anatomy) -> Times:
    return times(anatomy.trace(4, 128), find_node("p4d").gpu)


def cluster(
    nodes: int = 4, bandwidth: float = 1.0, latency: float = 1.0, sigma: float = 0.0
) -> Cluster:
    node = find_node("p4d")
    link = dataclasses.replace(
        node.inter,
        bandwidth=node.inter.bandwidth * bandwidth,
        latency=node.inter.latency * latency,
    )
    return Cluster(dataclasses.replace(node, inter=link, machine=Machine(sigma=sigma)), nodes)


@pytest.mark.parametrize("engine", list(PROFILES))
def test_time_falls_with_bandwidth_and_rises_with_latency(
    engine: Any, anatomy: Anatomy, made: Times
) -> None:
    run = Recipe(16, micro_steps=4)

    def seconds(**links: float) -> float:
        return simulate_engine(engine, anatomy, made, cluster(**links), run).seconds

    assert seconds(bandwidth=0.01) > seconds() >= seconds(bandwidth=100)
    assert seconds(latency=100) > seconds() >= seconds(latency=0.01)


def test_with_p_the_world_mics_moves_what_full_sharding_moves(anatomy: Anatomy) -> None:
    run = Recipe(32, micro_steps=4, form="flat")
    assert inter_bytes("mics", anatomy, cluster(), run) == inter_bytes(
        "fsdp2", anatomy, cluster(), run
    )


def test_with_p_the_world_mics_moves_what_zero_3_moves() -> None:
    """Where no parameter is so small that ZeRO-3 keeps it whole, and gradients are as wide."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512, bias=False)) for _ in range(3)))
    large = subject(
        model,
        loss=lambda m, b, s: m(torch.zeros(b, 512, device="meta", dtype=torch.bfloat16)).sum(),
    )
    run = Recipe(32, micro_steps=4, reduce_bytes=2, form="flat")
    mics = inter_bytes("mics", large, cluster(), run)
    assert mics == inter_bytes("zero3", large, cluster(), run)
    assert mics == inter_bytes("zero3 0.5.6", large, cluster(), run)
    wide = dataclasses.replace(run, reduce_bytes=4)
    assert mics == inter_bytes("zero3", large, cluster(), wide)  # it lowers gradients
    assert mics < inter_bytes("zero3 0.5.6", large, cluster(), wide)


def test_zero_3_of_today_keeps_small_parameters_and_gathers_them_once(anatomy: Anatomy) -> None:
    run, world = Recipe(32, micro_steps=4, reduce_bytes=2, form="flat"), Fraction(31, 32)
    units = (*anatomy.blocks, anatomy.root)
    small = sum(q.numel for u in units for q in u.parameters if q.numel < 100_000)
    assert small > 0
    gathered = [sum(q.padded(32) for q in u.parameters if q.numel >= 100_000) for u in units]
    reduced = sum(u.trained(32) for u in units)
    expected = 4 * (2 * sum(gathered[:-1]) + gathered[-1] + reduced) + small
    assert inter_bytes("zero3", anatomy, cluster(), run) == 2 * expected * world


def test_buckets_hold_reductions_back(anatomy: Anatomy, made: Times) -> None:
    """All gradients of a small model are one message, after its backward pass."""
    step = simulate_engine(
        "zero3", anatomy, made, cluster(), Recipe(32, micro_steps=1), timeline=True
    ).step
    reductions = [span for span in step.timeline if span.name.startswith("reduce")]
    last = max(span.end for span in step.timeline if span.stream == "compute")
    assert [span.name for span in reductions] == ["reduce root"]
    assert reductions[0].start >= last
    by_unit = simulate_engine(
        "fsdp2", anatomy, made, cluster(), Recipe(32, micro_steps=1), timeline=True
    ).step
    assert sum(s.name.startswith("reduce") for s in by_unit.timeline) == len(anatomy.blocks) + 1


def test_hop_2_of_small_blocks_is_one_message(anatomy: Anatomy, made: Times) -> None:
    """Of mics as its ledger counts; FSDP2's HSDP has one for each unit. Latencies are saved."""
    deep: Any = SimpleNamespace(blocks=[*anatomy.blocks] * 20, root=anatomy.root)
    long = dataclasses.replace(made, forward=made.forward * 20, backward=made.backward * 20)
    run, slow = Recipe(8, micro_steps=1), cluster(latency=20.0)
    ours = simulate_engine("mics", deep, long, slow, run, timeline=True).step
    theirs = simulate_engine("hsdp deferred", deep, long, slow, run, timeline=True).step
    messages = [
        [span for span in step.timeline if span.stream == "hop 2"] for step in (ours, theirs)
    ]
    units = [*reversed(deep.blocks), deep.root]
    sizes = [unit.trained(8) for unit in units]
    assert len(messages[0]) == len(joined(sizes, ["alike"] * len(sizes))) < len(units)
    assert len(messages[1]) == len(units)
    assert ours.total[2] < theirs.total[2]
    assert ours.seconds < theirs.seconds


def test_a_host_that_is_slower_costs(anatomy: Anatomy, made: Times) -> None:
    once = Recipe(32, micro_steps=1)
    slow, fast = (
        simulate_engine("zero3 0.5.6", anatomy, made, cluster(), once, host=host).seconds
        for host in (0.5e-3, 0.1e-3)
    )
    assert slow > fast


def test_with_p_1_mics_moves_what_ddp_moves(anatomy: Anatomy) -> None:
    run = Recipe(1, micro_steps=4)
    assert inter_bytes("mics", anatomy, cluster(), run) == inter_bytes(
        "ddp", anatomy, cluster(), run
    )


@pytest.mark.parametrize("p", [1, 2, 8, 16])
def test_with_one_micro_step_both_schedules_are_one(p: int, anatomy: Anatomy, made: Times) -> None:
    run = Recipe(p, micro_steps=1, form="flat")
    two_hop, every = (
        simulate_engine(engine, anatomy, made, cluster(), run).step.seconds
        for engine in ("hsdp deferred", "hsdp every micro-step")
    )
    assert two_hop == every  # type: ignore[comparison-overlap]
    assert inter_bytes("hsdp deferred", anatomy, cluster(), run) == inter_bytes(
        "hsdp every micro-step", anatomy, cluster(), run
    )


@pytest.mark.parametrize("engine", list(PROFILES))
def test_weak_scaling_is_at_most_perfect(engine: Any, anatomy: Anatomy, made: Times) -> None:
    spent, late = [], []
    run = Recipe(8, micro_steps=4, optimizer="adamw-fused")
    for nodes in (1, 2, 4, 16, 64, 256):
        step = simulate_engine(engine, anatomy, made, cluster(nodes, sigma=0.02), run).step
        # The optimizer step of a smaller shard is shorter: that is all that may fall.
        spent.append(step.seconds - step.late - optimizer_step(engine, anatomy, nodes))
        late.append(step.late / (step.seconds - step.late))
    for fewer, more in pairwise(spent):
        assert more >= fewer - 1e-12
    assert late == sorted(late)


def optimizer_step(engine: Any, anatomy: Anatomy, nodes: int) -> float:
    """By hand: AdamW reads four numbers of a parameter and writes three, 28 bytes."""
    profile = PROFILES[engine]
    split = {"world": 8 * nodes, "partition": 8, "no": 8 * nodes if profile.at_end else 1}
    units = (*anatomy.blocks, anatomy.root)
    shard = sum(unit.trained() for unit in units) // split[profile.sharded]
    return 28 * shard / (0.9 * 1555e9)


def test_with_p_1_mics_takes_as_long_as_ddp(anatomy: Anatomy, made: Times) -> None:
    both = [
        simulate_engine(engine, anatomy, made, cluster(), Recipe(1, micro_steps=4)).seconds
        for engine in ("mics", "ddp")
    ]
    assert both[0] == pytest.approx(both[1])


def test_averaging_every_micro_step_costs_more_the_more_there_are(
    anatomy: Anatomy, made: Times
) -> None:
    slow = cluster(bandwidth=0.01)

    def over_mics(micro_steps: int) -> float:
        every, deferred = (
            simulate_engine(engine, anatomy, made, slow, Recipe(8, micro_steps=micro_steps)).seconds
            for engine in ("hsdp every micro-step", "hsdp deferred")
        )
        return every / deferred

    ratios = [over_mics(s) for s in (1, 2, 4, 8, 16)]
    assert ratios[0] == pytest.approx(1.0)
    assert ratios == sorted(ratios)
    assert ratios[-1] > 1.5


@pytest.mark.parametrize("gpu", ["V100-32GB", "A100-40GB", "H100"])
def test_more_work_takes_longer(gpu: str, anatomy: Anatomy) -> None:
    chip = find_gpu(gpu)
    for checkpointing in (False, True):
        batches = [
            times(anatomy.trace(b, 64), chip, checkpointing=checkpointing).total
            for b in (1, 2, 3, 4, 5, 6, 8, 16, 64, 256)
        ]
        assert batches == sorted(batches)
        assert batches[-1] > batches[0]
    sizes = [10.0**n * m for n in range(3, 13) for m in (1, 2, 3, 5, 7)]
    products = [times(one_kernel(int(size), 8), CHIP).forward[0] for size in sizes]
    moved = [times(one_kernel(0, int(size)), CHIP).forward[0] for size in sizes]
    assert products == sorted(products)
    assert moved == sorted(moved)


def test_stages_run_beside_each_other_only_where_asked(anatomy: Anatomy, made: Times) -> None:
    run = Recipe(32, micro_steps=2, form="hierarchical")
    slow = cluster(bandwidth=0.001)
    one_by_one = simulate_engine("mics", anatomy, made, slow, run).seconds
    beside = dataclasses.replace(run, pipelined=True)
    assert simulate_engine("mics", anatomy, made, slow, beside).seconds < one_by_one


def test_bytes_are_those_of_the_traffic_module(anatomy: Anatomy) -> None:
    where, run = cluster(), Recipe(16, micro_steps=3)
    blocks = [
        traffic.Block(2 * u.numel(16), 4 * u.trained(16), 4 * u.trained(16) // 16)
        for u in anatomy.blocks
    ]
    root = anatomy.root
    blocks.append(
        traffic.Block(2 * root.numel(16), 4 * root.trained(16), 4 * root.trained(16) // 16, 1)
    )
    topology = Topology(4, 8, 16)
    for form in ("flat", "hierarchical"):
        expected = traffic.node_inter_bytes(
            [
                traffic.mics(topology, blocks, 3, all_gather=form, reduce_scatter=form, rank=rank)
                for rank in range(8)
            ]
        )
        asked = dataclasses.replace(run, form=form)  # type: ignore[arg-type]
        assert inter_bytes("mics", anatomy, where, asked) == expected
        assert isinstance(expected, Fraction)


@pytest.mark.parametrize("partition", [1, 4])
def test_replicas_of_a_node_are_summed_there_where_the_link_is_slow(
    partition: int, anatomy: Anatomy, made: Times
) -> None:
    """Rings of Gloo on 4 nodes of 8 GPUs; on trees of NCCL, which sum in nodes, nothing is won."""
    node, run = dataclasses.replace(find_node("p4d"), gloo=True), Recipe(partition, micro_steps=2)
    rings, trees = Cluster(node, 4), Cluster(find_node("p4d"), 4)
    seconds, sent = {}, {}
    for form in ("auto", "flat", "hierarchical"):
        asked = dataclasses.replace(run, hop_two_form=form)  # type: ignore[arg-type]
        seconds[form] = simulate_engine("mics", anatomy, made, rings, asked).seconds
        sent[form] = inter_bytes("mics", anatomy, rings, asked)
    assert seconds["auto"] == seconds["hierarchical"] < seconds["flat"]
    replicas = 32 // partition
    assert sent["auto"] == sent["hierarchical"]
    assert sent["auto"] / sent["flat"] == Fraction(3, 4) / Fraction(replicas - 1, replicas)
    flat = dataclasses.replace(run, hop_two_form="flat")
    taken = [simulate_engine("mics", anatomy, made, trees, one).seconds for one in (run, flat)]
    assert taken[0] == taken[1]
    coded = dataclasses.replace(run, hop_two="int8")
    forced = dataclasses.replace(coded, hop_two_form="flat")
    assert inter_bytes("mics", anatomy, rings, coded) == inter_bytes("mics", anatomy, rings, forced)


def test_what_gathers_inside_nodes_is_issued_at_the_end() -> None:
    """Two blocks of 1 s and rows that cross in 5 s: the first's gather is beside the second's."""
    stages = (Stage("intra", 1.0), Stage("inter", 5.0), Stage("intra", 1.0))
    block, root = UnitSeconds(0.0, 1.0, (), (), stages), UnitSeconds(0.0, 0.0, (), (), ())
    schedule = Schedule(micro_steps=1, gathers=False, pipelined=True, gloo=True)
    step = simulate([block, block], root, schedule)
    # Backward, reduce, 5 s + 5 s between nodes one behind the other, and the second's gather.
    assert step.seconds == pytest.approx(1 + 1 + 5 + 5 + 1)


def _counted(partition: int) -> int:
    """What this rank counts over the slow link in a step of two micro-steps, 2 nodes x 2 ranks."""
    torch.manual_seed(0)
    config = load_config("gpt2-tiny", vocabulary=1024, separator=0)
    model = mics.shard(
        build(config, device="cpu"),
        partition=partition,
        gpus_per_node=2,
        mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32),
        collectives="hierarchical",
    )
    ids = torch.randint(0, 1024, (2, 2, 32))
    for part in mics.micro_steps(model, list(ids)):  # the first step only sets up
        model(input_ids=part, labels=part).loss.backward()
    model.zero_grad()
    counts = mics.ledger(model)
    counts.reset()
    for part in mics.micro_steps(model, list(ids)):
        model(input_ids=part, labels=part).loss.backward()
    return int(counts.traffic().flow.inter_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("partition", [1, 2, 4])
def test_bytes_planned_are_bytes_counted(partition: int) -> None:
    counted = run_ranks(_counted, 4, partition)
    anatomy = subject("gpt2-tiny", vocabulary=1024)
    node = dataclasses.replace(find_node("p4d"), gpus_per_node=2)
    form: Any = "hierarchical"
    run = Recipe(partition, micro_steps=2, form=form, hop_two_form=form)
    planned = inter_bytes("mics", anatomy, Cluster(node, 2), run)
    assert planned * 2 == sum(counted)
    assert planned > 0


def test_a_frozen_block_is_gathered_and_not_reduced() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in range(3)))
    for param in model[0].parameters():
        param.requires_grad_(False)
    anatomy = subject(
        model,
        dtype=torch.float32,
        loss=lambda m, b, s: m(torch.zeros(b, 8, device="meta")).sum(),
    )
    trained = inter_bytes("zero2 0.5.6", anatomy, cluster(), Recipe(8, micro_steps=1))
    whole = (2 * 72 * Fraction(31, 32) * 4) + 3 * 72 * 2 * Fraction(31, 32)
    padded = sum(u.trained(32) for u in anatomy.blocks) * 4 * Fraction(31, 32)
    assert trained == padded + anatomy.num_parameters * 2 * Fraction(31, 32)
    assert trained > whole  # biases of 8 elements are padded to 32


def test_sixteen_thousand_gpus_are_simulated(anatomy: Anatomy, made: Times) -> None:
    found = simulate_engine("mics", anatomy, made, cluster(2048), Recipe(8, micro_steps=8))
    assert math.isfinite(found.seconds)
