"""Which rank owns which parameter: by the work of a step, from shapes alone.

Every rank comes to the same answer by itself. A parameter keeps its owner when groups are added.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from mics.communication.owners import Owner
from mics.quantities import MIB
from mics.ranks.mesh import Groups
from mics.sharding.units import Unit

_PACK_BYTES = 64 * MIB


class Dealt(NamedTuple):
    """The parameters of one mesh, in the order in which they were dealt, with their owners."""

    groups: Groups
    owners: dict[nn.Parameter, Owner]

    def packs(self, wanted: Collection[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Parameters that are sent together, owners of each pack loaded alike.

        A pack has a parameter for every rank of the mesh, and more while this rank's shards of them
        are no more than 64 MiB.
        """
        num_owners = self.groups.shard.size() * self.groups.num_replicas
        pack: list[nn.Parameter] = []
        nbytes = 0
        for param in self.owners:
            if param not in wanted:
                continue
            shard = -(-param.numel() // self.groups.shard.size()) * param.dtype.itemsize
            if len(pack) >= num_owners and nbytes + shard > _PACK_BYTES:
                yield pack
                pack, nbytes = [], 0
            pack.append(param)
            nbytes += shard
        if pack:
            yield pack


def deal_owners(
    groups_of_params: Iterable[Sequence[nn.Parameter]], units: dict[int, Unit]
) -> list[Dealt]:
    """Give every parameter that has a unit to one rank of its mesh.

    Args:
        groups_of_params: of an optimizer; they are dealt one after the other.
        units: by the ids of parameters.

    Returns:
        For each mesh, in the order in which parameters come to them.
    """
    dealt: dict[dist.ProcessGroup, Dealt] = {}
    loads: dict[dist.ProcessGroup, list[tuple[int, int, Owner]]] = {}  # heaps
    for params in groups_of_params:
        for param in sorted(params, key=_work, reverse=True):
            if id(param) not in units:
                continue
            groups = units[id(param)].groups
            mine = dealt.setdefault(groups.shard, Dealt(groups, {}))
            if groups.shard not in loads:
                loads[groups.shard] = _nothing(groups)
            load, place, owner = loads[groups.shard][0]
            heapq.heapreplace(loads[groups.shard], (load + _work(param), place, owner))
            mine.owners[param] = owner
    return list(dealt.values())


def _nothing(groups: Groups) -> list[tuple[int, int, Owner]]:
    """No work for any rank; few parameters go to different replicas first."""
    places, replicas = range(groups.shard.size()), range(groups.num_replicas)
    owners = [Owner(replica, place) for place in places for replica in replicas]
    return [(0, at, owner) for at, owner in enumerate(owners)]


def _work(param: torch.Tensor) -> int:
    """What a product of a matrix with its transpose costs; the size of what is no matrix."""
    return param.numel() * min(param.shape) if param.ndim > 1 else param.numel()
