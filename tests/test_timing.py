"""Seconds that ranks take together."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from ranks import run_ranks

from mics.communication.timing import slowest_seconds, time_in_turn
from mics.ranks.mesh import groups_of, init_mesh

CPU = torch.device("cpu")


def _late_and_slow() -> float:
    """Rank 1 comes late, rank 0 takes longest."""
    if dist.get_rank() == 1:
        time.sleep(0.5)
    return slowest_seconds(lambda: time.sleep(0.2 if dist.get_rank() == 0 else 0.0), CPU)


def test_the_slowest_rank_counts_and_one_that_comes_late_does_not() -> None:
    first, *others = run_ranks(_late_and_slow, 3)
    assert 0.2 <= first < 0.45
    assert others == [first] * 2


def _in_turn() -> tuple[list[str], dict[str, list[float]]]:
    made: list[str] = []
    calls = {name: lambda name=name: made.append(name) for name in ("a", "b")}  # type: ignore[misc]
    return made, time_in_turn(calls, 2, CPU)


def test_calls_take_turns_and_the_first_round_does_not_count() -> None:
    for made, seconds in run_ranks(_in_turn, 2):
        assert made == ["a", "b"] * 3
        assert {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2}


def _over_a_mesh() -> float:
    groups = groups_of(init_mesh(partition=2, gpus_per_node=2))
    slow = dist.get_rank() == 3  # neither in rank 0's partition group nor a replica of its shard
    return slowest_seconds(lambda: time.sleep(0.2 * slow), CPU, groups.axes)


def test_the_axes_of_a_mesh_reach_every_rank() -> None:
    seconds = run_ranks(_over_a_mesh, 4, ranks_per_node=2)
    assert len(set(seconds)) == 1
    assert 0.2 <= seconds[0] < 0.45
