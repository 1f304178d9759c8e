"""Parameters that a placement function puts on another mesh than that of their module.

Experts are spread over ranks that each hold other ones, so fewer ranks share one of them than share
the rest of a block. FSDP2 makes a parameter group for each mesh (``ShardPlacementResult`` of torch
2.12 and later); each becomes a unit with groups of its own. Replication is left out of what FSDP2
is told, as everywhere: hop 2 is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from mics import compat
from mics.anatomy.sizes import dim_to_split
from mics.ranks.mesh import Groups, groups_of
from mics.sharding.other_axes import check_names, refuse_overlap, unsharded


def along_longer_dims(home: Groups) -> Placements:
    """Place parameters as ``dim_to_split`` says, all on the module's mesh."""

    def place(param: nn.Parameter) -> Shard | None:
        if isinstance(param, DTensor) or compat.has_gather_hook(param):
            return None  # split over other axes already; cut by a rule of its own
        dim = dim_to_split(param.shape, home.shard.size())
        return Shard(dim) if dim else None

    return Placements(place, home)


@dataclass
class Placements:
    """A user's placement function as FSDP2 is given it.

    Args:
        place: as ``shard_placement_fn`` of FSDP2; ``None`` puts everything where the module is.
        home: the groups of the module's mesh.
    """

    place: Callable[[nn.Parameter], Any] | None
    home: Groups
    _infos: dict[dist.ProcessGroup, Any] = field(default_factory=dict)  # one for each group
    _groups: dict[dist.ProcessGroup, Groups] = field(default_factory=dict)

    def for_torch(self) -> Callable[[nn.Parameter], Any] | None:
        """What FSDP2 is told."""
        return None if self.place is None else self._told

    def of(self, param: nn.Parameter) -> Groups:
        """The groups that a parameter will be sharded over.

        Raises:
            TopologyError: the mesh would be taken for what it is not.
        """
        if self.place is None:
            return self.home
        mesh = compat.mesh_of_placement(self._asked(param))
        return self.home if mesh is None else self._on(mesh)

    def dim_of(self, param: nn.Parameter) -> int:
        """The dimension that a parameter will be sharded along."""
        placement = None if self.place is None else self._asked(param)
        if compat.mesh_of_placement(placement) is not None:
            placement = compat.shard_of_placement(placement)
        return 0 if placement is None else int(placement.dim) % max(1, param.dim())

    def of_group(self, shard: dist.ProcessGroup) -> Groups:
        """The groups behind a partition group that parameters were placed on."""
        return self._groups.get(shard, self.home)

    def elsewhere(self, modules: Sequence[nn.Module]) -> dict[nn.Parameter, Groups]:
        """The parameters that are not sharded yet and go to another mesh, in module order.

        Raises:
            ShardError: the ranks of that mesh hold different parts of one of them.
        """
        if self.place is None:
            return {}
        found: dict[nn.Parameter, Groups] = {}
        for name, param in unsharded(modules).items():
            groups = self.of(param)
            if groups is not self.home:
                if not compat.names_its_axes(self._asked(param)):
                    refuse_overlap({name: param}, groups.whole)
                found[param] = groups
        return found

    def _asked(self, param: nn.Parameter) -> Any:
        assert self.place is not None
        return self.place(param)

    def _told(self, param: nn.Parameter) -> Any:
        result = self._asked(param)
        mesh = compat.mesh_of_placement(result)
        if mesh is None:
            return result
        groups = self._on(mesh)
        if groups is self.home:
            return compat.shard_of_placement(result)
        if groups.shard not in self._infos:
            self._infos[groups.shard] = compat.shard_info(groups.mesh, result)
        return compat.placement_on(result, self._infos[groups.shard])

    def _on(self, mesh: DeviceMesh) -> Groups:
        check_names(mesh)
        groups = groups_of(mesh, gpus_per_node=self.home.gpus_per_node)
        if groups.shard is self.home.shard:
            return self.home
        return self._groups.setdefault(groups.shard, groups)
