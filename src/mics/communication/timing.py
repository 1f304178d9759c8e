"""Seconds that ranks take together: all begin at once, and the slowest one counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from mics.ranks.device import synchronise
from mics.ranks.issuing import all_reduce

Name = TypeVar("Name")


def slowest_seconds(
    call: Callable[[], object],
    device: torch.device,
    groups: Sequence[dist.ProcessGroup | None] = (None,),
) -> float:
    """Seconds of one call that all ranks make at once, on the slowest rank. Collective.

    Args:
        call: what is timed.
        device: the work of the call is waited for on it, and the groups communicate there.
        groups: together they reach every rank that is timed: the world, or the axes of a mesh.
    """
    synchronise(device)
    for group in groups:
        dist.barrier(group)
    start = time.perf_counter()
    call()
    synchronise(device)
    seconds = torch.tensor(time.perf_counter() - start, device=device)
    for group in groups:
        all_reduce(seconds, dist.ReduceOp.MAX, group)
    return seconds.item()


def time_in_turn(
    calls: Mapping[Name, Callable[[], object]],
    repeats: int,
    device: torch.device,
    groups: Sequence[dist.ProcessGroup | None] = (None,),
) -> dict[Name, list[float]]:
    """Seconds of several calls that take turns, so that what disturbs one disturbs all of them.

    A first round connects and warms up, and does not count.

    Args:
        calls: by name; every rank makes them in the same order.
        repeats: rounds that count.
        device: as in ``slowest_seconds``.
        groups: as in ``slowest_seconds``.

    Returns:
        By name, the slowest rank's seconds of every round.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            spent = slowest_seconds(call, device, groups)
            if number > 0:
                seconds[name].append(spent)
    return seconds
