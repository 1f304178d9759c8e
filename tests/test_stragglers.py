"""Who is slow is named right, from durations alone; and nobody where all is well."""

from __future__ import annotations

import json
import math
import random
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of_rank, run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics.communication.pace import Pace
from mics.communication.sockets import Sockets
from mics.quantities import MIB
from mics.ranks import waiting
from mics.ranks.lateness import Lateness, SlowRank, judge
from mics.ranks.slow_links import SlowGroup, SlowLink, TcpAlone
from mics.ranks.times import ROW, STEPS, Places, RankTimes, Sent, from_row
from mics.training.lookout import _steps_until_next

EIGHT = Places(tuple(range(8)), 2, 2)
SPANNING = Places(tuple(range(8)), 4, 2)


def of_rank(own: Sequence[float], **more: Any) -> RankTimes:
    middle = sorted(own)[len(own) // 2]
    reached = more.pop("reached", (0.01, 0.7 * middle, 0.3 * middle))
    return RankTimes(tuple(own), 1.4 * middle, reached, (0.1, 0.1, 0.1), **more)


def noisy(places: Places, seed: int, noise: float, slow: dict[int, float]) -> Lateness:
    """Ranks of 100 ms, each step and rank with its own noise, all of a step with a common one."""
    draw = random.Random(seed)
    common = [draw.uniform(0.8, 1.6) for _ in range(STEPS)]
    times = {}
    for rank in places.ranks:
        own = [0.1 * slow.get(rank, 1.0) * c * max(0.1, draw.gauss(1, noise)) for c in common]
        if draw.random() < 0.5:
            own[draw.randrange(STEPS)] *= draw.uniform(2, 30)  # a step with a checkpoint
        times[rank] = of_rank(own)
    return judge(times, places)


# -- the slow rank -------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4, 8, 64])
def test_of_1000_noisy_runs_without_a_slow_rank_none_is_named(world: int) -> None:
    places = Places(tuple(range(world)), 2, 2)
    for seed in range(250):
        for noise in (0.0, 0.02, 0.05, 0.1):
            assert noisy(places, seed, noise, {}).named == ()


@pytest.mark.parametrize("world", [2, 4, 8, 64])
def test_a_rank_slower_by_30_percent_is_named_in_200_of_200_noisy_runs(world: int) -> None:
    places = Places(tuple(range(world)), 2, 2)
    for seed in range(200):
        slow = seed % world
        (one,) = noisy(places, seed, 0.04, {slow: 1.3}).named
        assert isinstance(one, SlowRank)
        assert (one.rank, one.node) == (slow, slow // 2)


def test_both_ranks_of_a_slow_node_are_named() -> None:
    named = noisy(EIGHT, 0, 0.02, {4: 1.3, 5: 1.3}).named
    assert [(one.rank, one.node) for one in named if isinstance(one, SlowRank)] == [(4, 2), (5, 2)]


def test_a_rank_that_is_slow_in_a_few_steps_only_is_not_named() -> None:
    own = [0.1] * 12 + [0.5] * 4
    times = {rank: of_rank(own if rank == 3 else [0.1] * 16) for rank in range(8)}
    assert judge(times, EIGHT).named == ()


def test_a_rank_is_not_named_for_what_is_nothing_in_a_step() -> None:
    """Twice the others' time of its own, in a step that is all communication."""
    times = {
        rank: RankTimes((0.002 if rank == 3 else 0.001,) * 16, 0.5, (0.0, 0.001, 0.0), (0.3, 0, 0))
        for rank in range(8)
    }
    assert judge(times, EIGHT).named == ()


def test_a_rank_is_late_behind_the_part_that_takes_it_longer() -> None:
    for where, name in enumerate(("hop 1", "hop 2", "the end of the step")):
        slow = [0.01, 0.07, 0.02]
        slow[where] += 0.05
        times = {rank: of_rank([0.1] * 16, reached=(0.01, 0.07, 0.02)) for rank in range(8)}
        times[6] = of_rank([0.15] * 16, reached=tuple(slow))
        (one,) = judge(times, EIGHT).named
        assert isinstance(one, SlowRank)
        assert one.where == name
        assert f"late at {name}" in str(one)
        assert "rank 6 (node 3) is slow: 150.0 ms of its own in a step, +50%" in str(one)


def test_too_few_steps_say_nothing() -> None:
    times = {rank: of_rank([0.2 if rank == 3 else 0.1] * 4) for rank in range(8)}
    assert judge(times, EIGHT).named == ()


def test_one_rank_alone_is_compared_with_nobody() -> None:
    found = judge({0: of_rank([0.1] * 16)}, Places((0,), 1, 1))
    assert found.named == ()
    assert "nobody is slow" in str(found)


# -- the slow link -------------------------------------------------------------------------------


def linked(
    places: Places, rates: dict[tuple[int, int], float], *, sizes: dict[tuple[int, int], float]
) -> Lateness:
    """Ranks whose nodes send to each other at rates in Mbit/s; address 10 n is node n."""
    times = {}
    for rank in places.ranks:
        node = places.node_of(rank)
        sent = tuple(
            Sent(10 * a, 10 * b, sizes[a, b], 8 * sizes[a, b] / rate / 1e6)
            for (a, b), rate in rates.items()
            if a == node
        )
        times[rank] = of_rank([0.1] * 16, sent=sent)
    return judge(times, places)


def ring(nodes: int, slow: int | None, rate: float = 100, factor: float = 0.5) -> Any:
    """A ring in which the cable of one node is slower."""
    pairs = [(n, (n - 1) % nodes) for n in range(nodes)]
    return {pair: rate * (factor if slow in pair else 1) for pair in pairs}


@pytest.mark.parametrize("nodes", [3, 4, 5, 16])
def test_the_node_of_a_cable_of_half_the_rate_is_named(nodes: int) -> None:
    places = Places(tuple(range(2 * nodes)), 2, 2)
    for slow in range(nodes):
        rates = ring(nodes, slow)
        found = linked(places, rates, sizes=dict.fromkeys(rates, 4.0 * MIB))
        (one,) = found.named
        assert isinstance(one, SlowLink)
        assert one.nodes == (slow,)
        assert (one.where, round(one.rate / 1e6), round(one.peers / 1e6)) == ("hop 2", 50, 100)
        assert f"the link of node {slow} is slow: 50 Mbit/s in hop 2, 0.50 of" in str(one)
        assert f"node {slow} to node {(slow - 1) % nodes}" in str(found)


def test_rates_that_differ_by_noise_name_nobody() -> None:
    draw = random.Random(0)
    for _ in range(500):
        nodes = draw.choice([3, 4, 8])
        rates = {pair: draw.uniform(80, 115) for pair in ring(nodes, None)}
        places = Places(tuple(range(nodes)), 1, 1)
        assert linked(places, rates, sizes=dict.fromkeys(rates, 4.0 * MIB)).named == ()


def test_of_two_nodes_nobody_can_say_which_is_slow() -> None:
    rates = {(0, 1): 50.0, (1, 0): 100.0}
    places = Places((0, 1), 1, 1)
    assert linked(places, rates, sizes=dict.fromkeys(rates, 4.0 * MIB)).named == ()


def test_one_slow_direction_is_named_by_both_its_ends() -> None:
    rates = ring(4, None) | {(2, 1): 40.0}
    (one,) = linked(EIGHT, rates, sizes=dict.fromkeys(rates, 4.0 * MIB)).named
    assert isinstance(one, SlowLink)
    assert one.nodes == (2, 1)
    assert "the link from node 2 to node 1 is slow" in str(one)


def test_hops_are_compared_with_their_own_kind() -> None:
    """Partition groups of two nodes: hop 2 has a tenth of the rate of hop 1, on every link."""
    hop_1 = {(0, 1): 100.0, (1, 0): 100.0, (2, 3): 100.0, (3, 2): 100.0}
    hop_2 = {(0, 2): 10.0, (2, 0): 10.0, (1, 3): 10.0, (3, 1): 10.0}
    sizes = dict.fromkeys(hop_1 | hop_2, 4.0 * MIB)
    assert linked(SPANNING, hop_1 | hop_2, sizes=sizes).named == ()
    halved = {pair: rate / 2 if 1 in pair else rate for pair, rate in (hop_1 | hop_2).items()}
    (one,) = linked(SPANNING, halved, sizes=sizes).named
    assert isinstance(one, SlowLink)
    assert one.nodes == (1,)


def test_pairs_that_have_sent_little_are_not_compared() -> None:
    rates = ring(4, None) | {(2, 0): 1.0}
    sizes = dict.fromkeys(rates, 4.0 * MIB) | {(2, 0): 1000.0}
    found = linked(EIGHT, rates, sizes=sizes)
    assert found.named == ()
    assert (2, 0) not in found.rates


def test_a_rate_an_order_below_is_said_to_be_another_network() -> None:
    rates = ring(4, 2, rate=100_000, factor=0.05)
    (one,) = linked(EIGHT, rates, sizes=dict.fromkeys(rates, 4.0 * MIB)).named
    assert "fallen back to a slower network" in str(one)


def test_a_node_that_sends_by_tcp_alone_has_fallen_back() -> None:
    rates = ring(4, None)  # the connections of a few words
    sizes = dict.fromkeys(rates, 900.0) | {(2, 1): 40e6}
    (one,) = linked(EIGHT, rates, sizes=sizes).named
    assert isinstance(one, TcpAlone)
    assert one.nodes == (2,)
    assert "node 2 has fallen back to TCP: it sent 80 MB" in str(one)


def test_nodes_of_one_address_have_no_links_of_their_own() -> None:
    times = {
        rank: of_rank([0.1] * 16, sent=(Sent(7, 8, 1e7, 1.0), Sent(8, 7, 1e7, 1.0)))
        for rank in range(8)
    }
    assert judge(times, EIGHT).rates == {}


# -- the slow group, where nobody knows rates ------------------------------------------------------


def took(places: Places, seconds: dict[tuple[int, ...], float]) -> Lateness:
    """Accelerators whose groups need so long in a step; all but the last of each wait more."""
    times = {}
    for rank in places.ranks:
        mine = [
            [
                value * (1 if rank == group[-1] else 3)
                for group, value in seconds.items()
                if rank in group and (group in places.partition_groups) == (hop == 0)
            ]
            for hop in (0, 1)
        ]
        fastest = tuple(one[0] if one else 0.0 for one in mine)
        times[rank] = of_rank([0.1] * 16, fastest=fastest)
    return judge(times, places)


def test_groups_that_take_equally_long_are_not_named() -> None:
    hop_1 = dict.fromkeys(SPANNING.partition_groups, 0.05)
    hop_2 = dict.fromkeys(SPANNING.replication_groups, 0.02)
    assert took(SPANNING, hop_1 | hop_2).named == ()


def test_the_node_that_slow_groups_of_both_hops_have_is_named() -> None:
    """Node 1 has ranks 2 and 3: they gather with 0 and 1, and reduce with 6 and 7."""
    hop_1 = {group: 0.1 if 2 in group else 0.05 for group in SPANNING.partition_groups}
    hop_2 = {g: 0.06 if {2, 3} & set(g) else 0.02 for g in SPANNING.replication_groups}
    (one,) = took(SPANNING, hop_1 | hop_2).named
    assert isinstance(one, SlowGroup)
    assert (one.nodes, one.where) == ((1,), "hop 2")
    assert "the link of node 1 is slow: hop 2 among ranks" in str(one)
    assert "3.0 times as long as among its peers" in str(one)


def test_slow_groups_of_one_hop_are_named_once_with_all_their_nodes() -> None:
    hop_2 = {g: 0.06 if {2, 3} & set(g) else 0.02 for g in SPANNING.replication_groups}
    (one,) = took(SPANNING, hop_2).named
    assert isinstance(one, SlowGroup)
    assert one.nodes == (1, 3)


def test_a_slow_partition_group_is_named_with_its_nodes() -> None:
    places = Places(tuple(range(16)), 4, 2)
    slow = (4, 5, 6, 7)
    seconds = {group: 0.5 if group == slow else 0.05 for group in places.partition_groups}
    (one,) = took(places, seconds).named
    assert isinstance(one, SlowGroup)
    assert (one.ranks, one.nodes, one.where) == (slow, (2, 3), "hop 1")
    assert "the links of nodes 2, 3 are slow: hop 1 among ranks 4, 5, 6, 7 takes 500.0 ms" in str(
        one
    )
    assert "fallen back to a slower network" in str(one)


def test_a_partition_group_inside_a_node_names_the_node() -> None:
    seconds = {group: 0.05 if group == (4, 5) else 0.02 for group in EIGHT.partition_groups}
    (one,) = took(EIGHT, seconds).named
    assert isinstance(one, SlowGroup)
    assert "the link of node 2 is slow: hop 1 among ranks 4, 5" in str(one)


def test_a_difference_that_is_nothing_in_a_step_is_not_named() -> None:
    seconds = {group: 3e-4 if group == (4, 5) else 1e-4 for group in EIGHT.partition_groups}
    assert took(EIGHT, seconds).named == ()


# -- as numbers ----------------------------------------------------------------------------------


def test_what_is_sent_comes_back() -> None:
    times = RankTimes(
        own=tuple(0.001 * i for i in range(5)),
        step=0.5,
        reached=(0.1, 0.2, 0.3),
        waited=(0.4, 0.5, 0.6),
        fastest=(0.25, 0.125),
        sent=(Sent(2**32 + 5, 2**33 - 1, 1e9, 3.5), Sent(1, 2, 5.0, 1e-6)),
    )
    row = times.as_row()
    assert len(row) == ROW
    assert from_row(torch.tensor(row, dtype=torch.float64).tolist()) == times


def test_the_table_of_a_large_job_is_cut_and_says_so() -> None:
    places = Places(tuple(range(512)), 8, 8)
    text = str(noisy(places, 0, 0.01, {300: 1.5}))
    assert "and 480 ranks with less time of their own" in text
    assert "  300    37" in text
    assert len(text.splitlines()) == 35
    json.dumps(noisy(places, 0, 0.01, {}).as_json())


@pytest.mark.parametrize(
    ("world", "step", "steps"), [(8, 1.0, 10), (8, 0.01, 480), (512, 1.0, 55), (512, 10.0, 10)]
)
def test_looks_take_half_a_thousandth_of_the_time(world: int, step: float, steps: int) -> None:
    places = Places(tuple(range(world)), 8, 8)
    times = {
        rank: RankTimes((0.1,) * 16, step, (0.1, 0.1, 0.1), (0, 0, 0)) for rank in range(world)
    }
    assert _steps_until_next(judge(times, places)) == steps


# -- what is measured ----------------------------------------------------------------------------


def test_the_clock_of_its_own_stands_still_in_a_wait() -> None:
    waited = 0.0

    class Work:
        def wait(self, _: object) -> bool:
            nonlocal waited
            began = time.monotonic()
            time.sleep(0.2)
            waited = time.monotonic() - began
            return True

    place: Any = None
    began, clock = time.monotonic(), waiting.own_clock()
    waiting.wait_for_work(Work(), place)  # type: ignore[arg-type]
    time.sleep(0.05)
    own = waiting.own_clock() - clock
    assert 0.05 <= own <= time.monotonic() - began - waited


def test_a_step_on_an_accelerator_is_what_collectives_leave_of_it() -> None:
    pace = Pace(on_host=False)
    for _ in range(3):
        pace.reached(1)
        pace.took(1, 0.005, "gather")
        pace.took(1, 0.015, "gather")
        pace.took(2, 0.01, "reduce")
        time.sleep(0.05)
        pace.end_step()
    times = pace.times()
    assert len(times.own) == 2  # the first end is where the first step begins
    assert all(0.02 <= own < 1 for own in times.own)
    assert times.step - 0.03 == pytest.approx(sum(times.own) / 2)
    assert times.waited == pytest.approx((0.02, 0.01, 0.0))
    assert all(math.isnan(value) for value in times.reached)
    assert times.fastest == pytest.approx((2 * 0.005, 0.01))
    assert pace.times().fastest == (0.0, 0.0)  # counted anew


@contextmanager
def connected(size: int) -> Iterator[None]:
    """A connection of this process with itself, between two addresses, over which bytes went."""
    with socket.create_server(("127.0.0.2", 0)) as server:
        here = socket.create_connection(server.getsockname(), source_address=("127.0.0.1", 0))
        there, _ = server.accept()
        with here, there:
            here.setblocking(True)
            for _ in range(size // 1000):
                here.sendall(bytes(1000))
                left = 1000
                while left:
                    left -= len(there.recv(left))
            yield
            assert here.getblocking()
            assert there.getblocking()


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="only Linux tells")
def test_bytes_of_a_connection_are_counted_and_nothing_is_left_open() -> None:
    sockets = Sockets()
    sockets.sent()
    sockets._not_before = 0.0
    before = len(list(Path("/proc/self/fd").iterdir()))
    with connected(500_000):
        one = sockets.sent()[0]
        assert (one.source, one.target) == (0x7F000001, 0x7F000002)
        assert one.num_bytes == pytest.approx(500_000, abs=2000)
        assert 0 <= one.busy < 60
        assert sockets.sent() == []  # so soon again it would take more than its share of the time
        sockets._not_before = 0.0
        assert all(again.num_bytes == 0 for again in sockets.sent())
    assert len(list(Path("/proc/self/fd").iterdir())) == before


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        time.sleep(seconds)
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        time.sleep(2 * ctx.seconds)
        return gradients[0], None


class Sleeper(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8))
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        slept: torch.Tensor = Sleep.apply(x @ self.weight / 8, self.seconds)
        return slept


def _train(slow: int, *, blocks: float, between: float) -> tuple[str, list[Any]]:
    """8 steps of sleeping blocks, one rank slower inside of them or between steps."""
    late = dist.get_rank() == slow
    torch.manual_seed(0)
    seconds = 0.005 * (blocks if late else 1)
    model = nn.Sequential(*[Sleeper(seconds) for _ in range(3)])
    mics.shard(model, mesh=mesh_of_rank(2, 2), mp_policy=MixedPrecisionPolicy(), collectives="flat")
    for _ in range(9):
        for x in mics.micro_steps(model, list(torch.ones(2, 2, 8))):
            model(x).mean().backward()
        model.zero_grad()
        time.sleep(between if late else 0)
    found = mics.stragglers(model)
    return str(found), [(type(one).__name__, one.where) for one in found.named]  # type: ignore[union-attr]


@pytest.mark.parametrize(("blocks", "between", "where"), [(5.0, 0.0, "hop 2"), (1.0, 0.4, "hop 1")])
def test_a_slow_rank_is_named_on_every_rank(blocks: float, between: float, where: str) -> None:
    answers = run_ranks(lambda: _train(2, blocks=blocks, between=between), 4, ranks_per_node=2)
    assert len({text for text, _ in answers}) == 1
    assert "rank 2 (node 1) is slow" in answers[0][0]
    assert all(named == [("SlowRank", where)] for _, named in answers)


def test_ranks_that_are_alike_are_not_named() -> None:
    answers = run_ranks(lambda: _train(2, blocks=1.0, between=0.0), 4, ranks_per_node=2)
    assert all(named == [] for _, named in answers)
    assert "nobody is slow" in answers[0][0]
