"""A small bandwidth probe per link class: all-gathers inside nodes and between nodes.

Figures are those of nccl-tests for an all-gather over n ranks that takes t seconds and leaves S
bytes on each: algbw = S / t, busbw = algbw (n - 1) / n. The bus bandwidth is what each rank puts on
its link in a ring, whatever n is.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from mics import compat
from mics.communication.timing import time_in_turn
from mics.quantities import KIB, MIB
from mics.topology import Ranks, Topology, nodes_of

LinkClass = Literal["intra", "inter"]

SIZES_BYTES = (64 * KIB, 4 * MIB)
_REPEATS = 5
_CALLS = 4  # in one repeat, so that a clock's or a stream's delay weighs less
_ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class Probe:
    """What one all-gather took; ``num_groups`` groups of ``num_ranks`` ran it at the same time.

    ``seconds`` holds one figure per repeat, that of the slowest rank of the job.
    """

    num_groups: int
    num_ranks: int
    message_bytes: int
    seconds: tuple[float, ...]

    @property
    def median_seconds(self) -> float:
        """Return the seconds of the median repeat."""
        return statistics.median(self.seconds)

    @property
    def algbw(self) -> float:
        """Return the bytes gathered per second in the median repeat, in GB/s (10^9)."""
        return self.message_bytes / self.median_seconds / 1e9

    @property
    def busbw(self) -> float:
        """Return the bytes per second on a rank's link in the median repeat, in GB/s (10^9)."""
        return self._busbw(self.median_seconds)

    @property
    def busbw_range(self) -> tuple[float, float]:
        """Return the slowest and the fastest repeat's bus bandwidth, in GB/s (10^9)."""
        return self._busbw(max(self.seconds)), self._busbw(min(self.seconds))

    def _busbw(self, seconds: float) -> float:
        return self.message_bytes * (self.num_ranks - 1) / self.num_ranks / seconds / 1e9


def probed_groups(topology: Topology) -> dict[LinkClass, list[Ranks]]:
    """Return the groups that measure each link class, one per rank; [] where there is no such link.

    They are the ones training uses: the stages of hop 1 where a partition group spans nodes.
    Otherwise nodes are crossed by hop 2 alone, so inter is equal local ranks of all nodes.
    """
    k, world = topology.gpus_per_node, range(topology.world)
    intra = topology.intra_groups() if topology.partition > 1 else nodes_of(world, k)
    inter = topology.inter_groups()
    if topology.nodes > 1 and not inter:
        inter = [tuple(world[local::k]) for local in range(k)]
    return {"intra": intra if len(intra[0]) > 1 else [], "inter": inter}


def probe_links(topology: Topology, device: torch.device) -> dict[LinkClass, list[Probe]]:
    """Measure every link class in a few sizes. Collective over the world.

    Returns:
        The same figures on every rank; [] for a link class that does not exist.
    """
    return {
        link: _probe_link(groups, device) if groups else []
        for link, groups in probed_groups(topology).items()
    }


def _probe_link(groups: Sequence[Ranks], device: torch.device) -> list[Probe]:
    mine = next(ranks for ranks in groups if dist.get_rank() in ranks)
    # One group for all sizes: making the same one again would meet the first one's addresses.
    group = dist.new_group(list(mine), use_local_synchronization=True, group_desc="mics_doctor")
    assert isinstance(group, dist.ProcessGroup)
    return [_probe(groups, group, message_bytes, device) for message_bytes in SIZES_BYTES]


def _probe(
    groups: Sequence[Ranks], group: dist.ProcessGroup, message_bytes: int, device: torch.device
) -> Probe:
    n = group.size()
    shard_bytes = max(1, message_bytes // n // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    shard = torch.zeros(shard_bytes, dtype=torch.uint8, device=device)
    whole = torch.empty(n * shard_bytes, dtype=torch.uint8, device=device)

    def calls() -> None:
        for _ in range(_CALLS):
            compat.all_gather(whole, shard, group)

    # The whole world begins at once: groups share links in training, so they do here.
    seconds = time_in_turn({"all_gather": calls}, _REPEATS, device)["all_gather"]
    return Probe(len(groups), n, n * shard_bytes, tuple(each / _CALLS for each in seconds))
