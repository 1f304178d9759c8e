"""How tensors are spread over ranks, so that a sum over ranks counts each of their values once.

Every rank comes to the same list, in the same order, whatever gradients it has: what is asked of a
few tensors is answered for every unit beside theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mics import compat
from mics.communication.shares import owned_of
from mics.errors import ConfigError
from mics.ranks.mesh import Groups, axes_beside, ranks_of
from mics.sharding.belonging import known_units
from mics.sharding.units import Unit


@dataclass(frozen=True)
class Split:
    """One way to be spread.

    Attributes:
        mesh: of the shards; a whole tensor has none.
        axes: of the mesh, those it is sharded over.
        copies: as many of ``Spread.others`` hold it or a part of it, if the rest of those have
            another tensor in its place, as with experts; 0 if there are no others.
        replicas: it is spread over these too, where each owns a share of the shard.
    """

    mesh: DeviceMesh | None = None
    axes: tuple[int, ...] = ()
    copies: int = 0
    replicas: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Spread:
    """How some tensors are spread.

    Attributes:
        of: the split of each of them.
        splits: those, and those of every unit beside theirs.
        others: the groups over which tensors in each other's place are added up.
    """

    of: list[Split]
    splits: list[Split]
    others: list[dist.ProcessGroup]


def spread_of(tensors: Sequence[torch.Tensor]) -> Spread:
    """How tensors are spread: parameters, their gradients, or what was made of either.

    What ranks own of parameters, and the gradients of that, are spread over the replicas too.

    Raises:
        ConfigError: it cannot be told whether other ranks hold another tensor in its place.
    """
    by_tensor, units_on = _by_tensor(), None
    homes: list[Unit | None] = []
    units: dict[Unit, None] = {}
    for tensor in tensors:
        home = by_tensor[id(tensor)].unit if id(tensor) in by_tensor else None
        if home is None and isinstance(tensor, DTensor):
            units_on = units_on or _by_mesh()
            home = _only(units_on.get(tensor.device_mesh, []))
        homes.append(home)
        if home is not None and home not in units:
            units |= dict.fromkeys([*home.tree(), home])
    largest = max(units, key=lambda unit: unit.groups.whole.size(), default=None)
    others, copies = _in_each_others_place(units, largest)
    places = [by_tensor.get(id(tensor), _Place(tensor)) for tensor in tensors]
    of = [
        _split(place, 0 if home is None else copies[home])
        for place, home in zip(places, homes, strict=True)
    ]
    of_shares = any(place.is_share for place in places)
    beside = [
        _split(_Place(param, unit, of_shares and unit.share is not None), copies[unit])
        for unit in units
        for param in compat.sharded_params(unit.group)
    ]
    return Spread(of, list(dict.fromkeys([*beside, *of])), others)


@dataclass(frozen=True)
class _Place:
    """Where a tensor belongs.

    Attributes:
        like: a tensor that is spread as it is over the ranks of a replica.
        unit: of the parameter that it is, or is a gradient of.
        is_share: whether it is what this rank owns of it.
    """

    like: torch.Tensor
    unit: Unit | None = None
    is_share: bool = False


def _by_tensor() -> dict[int, _Place]:
    """The places of all sharded parameters of this process, of what it owns, of their gradients."""
    found: dict[int, _Place] = {}
    for unit in known_units():
        for param in compat.sharded_params(unit.group):
            for one, is_share in ((param, False), (owned_of(param), True)):
                if one is not None:
                    place = _Place(param, unit, is_share)
                    found |= {id(one): place} | ({} if one.grad is None else {id(one.grad): place})
    return found


def _by_mesh() -> dict[DeviceMesh, list[Unit]]:
    found: dict[DeviceMesh, dict[Unit, None]] = {}
    for unit in known_units():
        for param in compat.sharded_params(unit.group):
            if isinstance(param, DTensor):
                found.setdefault(param.device_mesh, {})[unit] = None
    return {mesh: list(units) for mesh, units in found.items()}


def _only(units: list[Unit]) -> Unit | None:
    """One of units on a mesh, whose ranks are the same.

    Raises:
        ConfigError: they are not.
    """
    sizes = sorted({unit.groups.whole.size() for unit in units})
    if len(sizes) > 1:
        raise ConfigError(
            "A tensor that is no parameter and no gradient is on a mesh that units with other "
            "numbers of replicas share, so nobody can tell how many ranks hold it.",
            numbers=f"They are on {' and '.join(map(str, sizes))} ranks.",
            write="mics.get_total_norm of the gradients themselves",
        )
    return units[0] if units else None


def _in_each_others_place(
    units: Iterable[Unit], largest: Unit | None
) -> tuple[list[dist.ProcessGroup], dict[Unit, int]]:
    """The groups of all ranks, or of one replica that has everything, and ``copies`` there."""
    if largest is None:
        return [], {}
    everybody = [*largest.groups.axes, *_beside(largest)]
    ranks = 1
    for group in everybody:
        ranks *= group.size()
    held = {unit: _num_holders(unit, largest, ranks) for unit in units}
    partial = [unit for unit in units if held[unit]]
    inside = {unit: _copies_in_a_replica(unit, largest.groups) for unit in partial}
    if partial and all(inside.values()):
        return [largest.groups.shard], {**held, **inside}
    return everybody, held


def _num_holders(unit: Unit, largest: Unit, ranks: int) -> int:
    """How many ranks hold what a unit has, if fewer than all that the largest is on; else 0.

    A parameter may hold all experts, spread over ranks beside those that it is sharded over.
    """
    if unit.groups.whole.size() >= largest.groups.whole.size():
        return 0
    holders = max(mesh.size() for mesh in _meshes_of(unit)) * unit.groups.num_replicas
    return holders if holders < ranks else 0


def _beside(unit: Unit) -> list[dist.ProcessGroup]:
    """The groups of the axes beside those of the data that its parameters are on."""
    found = [axes_beside(unit.groups, mesh).values() for mesh in _meshes_of(unit)]
    return list({ranks_of(group): group for groups in found for group in groups}.values())


def _meshes_of(unit: Unit) -> list[DeviceMesh]:
    params = compat.sharded_params(unit.group)
    return list(dict.fromkeys(p.device_mesh for p in params if isinstance(p, DTensor)))


def _copies_in_a_replica(unit: Unit, everybody: Groups) -> int:
    """How many ranks of each partition group hold what a unit has, if it has all others too.

    Read from the mesh that the unit's was cut out of, so that all ranks come to the same; 0 if it
    does not tell.
    """
    root, names = compat.root_of(unit.groups.whole), unit.groups.whole.mesh_dim_names or ()
    axes = root.mesh_dim_names or ()
    ranks = everybody.whole.mesh
    if sorted(root.mesh.flatten().tolist()) != sorted(ranks.flatten().tolist()):
        return 0
    if not names or not set(names) <= set(axes) or len(_meshes_of(unit)[0].shape) > 1:
        return 0
    other = [i for i, axis in enumerate(axes) if axis not in names]
    held = {int(root.mesh[tuple(at)]): tuple(at[other].tolist()) for at in _places(root.mesh)}
    replicas = ranks.view(-1, everybody.shard.size()).tolist()
    counts = [Counter(held[rank] for rank in replica) for replica in replicas]
    alike = {count for row in counts for count in row.values()}
    complete = all(len(row) == len(set(held.values())) for row in counts)
    return alike.pop() if complete and len(alike) == 1 else 0


def _places(mesh: torch.Tensor) -> torch.Tensor:
    """The coordinates of all ranks. Shape (ranks, axes)."""
    return torch.cartesian_prod(*(torch.arange(n) for n in mesh.shape)).view(-1, mesh.ndim)


def _split(place: _Place, copies: int) -> Split:
    if not isinstance(place.like, DTensor):
        return Split()
    axes = tuple(
        i
        for i, placed in enumerate(place.like.placements)
        if not placed.is_replicate() and not placed.is_partial()
    )
    owners = place.unit.groups.replicas if place.is_share and place.unit is not None else None
    return Split(place.like.device_mesh, axes, copies, owners)
