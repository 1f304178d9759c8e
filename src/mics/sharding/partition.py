"""The partition size when nobody names one: the smallest whose pooled memory holds the model.

MiCS section 3.2: smaller groups talk to fewer ranks over faster links, so p is as small as memory
allows. What a rank needs is the planner's memory model (``anatomy/memory.py``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mics.errors import ShardError
from mics.quantities import size
from mics.ranks.device import on_accelerator
from mics.topology import possible_partitions

FOR_STATES = 0.7
"""Share of a device for model states and blocks, where activations are not known."""

_MOST_RANKS = 1 << 17


@dataclass(frozen=True)
class PartitionChoice:
    """A partition size and why."""

    partition: int
    reason: str


def choose_partition(
    need: Callable[[int], int],
    device_bytes: int,
    *,
    nodes: int,
    gpus_per_node: int,
    share: float = 1.0,
) -> PartitionChoice:
    """The smallest legal p that fits.

    Args:
        need: bytes a rank needs with a partition of that many ranks.
        device_bytes: memory of one rank's device, the smallest of all ranks.
        nodes: number of nodes.
        gpus_per_node: ranks per node.
        share: of the device that may be used; what is left is for what ``need`` does not count.

    Raises:
        ShardError: not even the whole cluster holds one replica.
    """
    budget = device_bytes * share
    possible = possible_partitions(nodes, gpus_per_node)
    p = next((p for p in possible if need(p) <= budget), None)
    kept = f", {1 - share:.0%} kept for activations" if share < 1 else ""
    if p is None:
        raise ShardError(
            f"The model does not fit: with one replica over all {possible[-1]} rank(s) each still "
            f"needs {size(need(possible[-1]), least='MiB')}.",
            numbers=f"A rank has {size(device_bytes, least='MiB')}{kept}; on 1 rank it would need "
            f"{size(need(1), least='MiB')}.",
            write=_instead(need, budget, possible[-1]),
        )
    reason = (
        f"partition {p}: smallest that fits ({size(need(p), least='MiB')} of "
        f"{size(device_bytes, least='MiB')}{kept})"
    )
    smaller = [q for q in possible if q < p]
    if smaller:
        reason += f"; {smaller[-1]} would need {size(need(smaller[-1]), least='MiB')}"
    return PartitionChoice(p, reason)


def _instead(need: Callable[[int], int], budget: float, ranks: int) -> str:
    """The fewest ranks, in steps of doubling, on which it would fit."""
    while ranks < _MOST_RANKS:
        ranks *= 2
        if need(ranks) <= budget:
            return f"about {ranks} ranks, a smaller model, activation checkpointing, or CPU offload"
    return "a smaller model, a smaller micro-batch, or devices with more memory"


def device_memory(device: torch.device, ranks_per_host: int) -> int:
    """Bytes one rank may use: its accelerator's memory, or its part of the host's."""
    if on_accelerator(device):
        properties = torch.get_device_module(device).get_device_properties(device)
        return int(properties.total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks_per_host
