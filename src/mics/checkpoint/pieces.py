"""Who writes which part of what is to be kept: each box of a tensor is written once.

[Note: one name, other values]
Ranks outside the mesh of a tensor hold something else under its name: copies, as a norm beside
tensor parallelism, or other values, as experts of which every rank has its own. Nothing but the
values tells which. Copies are written once; of other values a checkpoint would have one rank's.
Copies that drifted apart are other values too; the name of the axis between two ranks tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from mics import compat
from mics.checkpoint.contents import Contents
from mics.checkpoint.peers import Peers
from mics.errors import CheckpointError
from mics.ranks.mesh import ranks_of
from mics.sharding.other_axes import axis_of_parts
from mics.sharding.same_start import fingerprint
from mics.sharding.units import units_on

_Box = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Number of a tensor, offset and shape in it."""


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that this rank writes."""

    name: str
    offset: tuple[int, ...]
    values: torch.Tensor


def pieces_of_this_rank(contents: Contents, model: nn.Module, peers: Peers) -> list[Piece]:
    """What this rank writes, evenly so. Collective.

    The replicas hold the same shards, so a tensor is written by one replica: the one that has the
    fewest bytes so far, largest tensors first. All ranks come to the same answer without asking
    each other. What not every rank has a part or a copy of is written by the first that holds it.
    Tensors that are not sharded (buffers, step counts) are rank 0's.

    Raises:
        CheckpointError: on every rank: ranks hold other values under one name.
    """
    replicas = _replicas_of_meshes(model)
    loads: dict[int, list[int]] = {}
    mine: dict[str, torch.Tensor] = {}
    apart: dict[str, DTensor] = {}
    largest_first = sorted(contents.tensors.items(), key=lambda item: (-item[1].numel(), item[0]))
    for name, tensor in largest_first:
        if not isinstance(tensor, DTensor):
            if peers.rank == 0:
                mine[name] = tensor
            continue
        if _num_holders(tensor, replicas) < peers.world:
            apart[name] = tensor
            continue
        replica, count = _replica_of(tensor, replicas)
        load = loads.setdefault(count, [0] * count)
        writer = load.index(min(load))
        load[writer] += tensor.numel() * tensor.element_size()
        if replica == writer:
            mine[name] = tensor
    return _boxes(mine) + _written_by_first(apart, peers)


def _boxes(tensors: Mapping[str, torch.Tensor]) -> list[Piece]:
    """The parts of tensors that this rank has, without those that are empty."""
    pieces = []
    for item in create_default_local_save_plan(dict(tensors), is_coordinator=False).items:
        values = find_state_dict_object(dict(tensors), item.index).detach()
        assert item.tensor_data is not None
        if values.numel():
            offset = tuple(item.tensor_data.chunk.offsets)
            pieces.append(Piece(item.index.fqn, offset, values))
    return pieces


# -- replicas --------------------------------------------------------------------------------------


def _replicas_of_meshes(model: nn.Module) -> dict[DeviceMesh, tuple[int, int]]:
    """(replica, number of replicas) of the meshes that parameters of units are on.

    Those of a mesh that has the replicas as an axis of its own are told by the placements.
    """
    found: dict[DeviceMesh, tuple[int, int]] = {}
    for module in model.modules():
        for unit in units_on(module):
            replicas = unit.groups.replicas
            for param in compat.sharded_params(unit.group):
                if replicas is None or not isinstance(param, DTensor):
                    continue
                ranks = set(param.device_mesh.mesh.flatten().tolist())
                if not ranks.issuperset(ranks_of(replicas)):
                    found[param.device_mesh] = (replicas.rank(), replicas.size())
    return found


def _num_holders(tensor: DTensor, replicas: Mapping[DeviceMesh, tuple[int, int]]) -> int:
    """Ranks that have a part or a copy of a tensor."""
    mesh = tensor.device_mesh
    return mesh.size() * replicas.get(mesh, (0, 1))[1]


def _replica_of(tensor: DTensor, replicas: Mapping[DeviceMesh, tuple[int, int]]) -> tuple[int, int]:
    """Which of how many equal copies this rank's part of a tensor is."""
    mesh = tensor.device_mesh
    replica, count = replicas.get(mesh, (0, 1))
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            replica = replica * mesh.size(dim) + coordinate[dim]
            count *= mesh.size(dim)
    return replica, count


# -- what ranks have in each other's place ---------------------------------------------------------


def _written_by_first(apart: Mapping[str, DTensor], peers: Peers) -> list[Piece]:
    """The pieces of some tensors whose boxes this rank is the first to hold. Collective.

    See [Note: one name, other values].
    """
    numbers = {name: number for number, name in enumerate(sorted(apart))}
    held: list[Piece] = []

    def look() -> list[Any]:
        held.extend(_boxes(apart))
        return [
            [numbers[p.name], p.offset, tuple(p.values.shape), int(fingerprint(p.values))]
            for p in held
        ]

    first: dict[_Box, tuple[int, int]] = {}  # the first rank that holds it, and its values
    for rank, boxes in enumerate(peers.together(look)):
        for number, offset, shape, value in boxes:
            box = number, tuple(offset), tuple(shape)
            holder, others = first.setdefault(box, (rank, value))
            if value != others:
                name = sorted(apart)[number]
                axis = axis_of_parts(apart[name].device_mesh, holder, rank)
                raise other_values(name, tuple(offset), holder, rank, axis)
    for name, number in numbers.items():
        cells = sum(prod(shape) for n, _, shape in first if n == number)
        if cells != apart[name].numel():
            raise other_layouts(name, cells, apart[name].numel())
    return [
        piece
        for piece in held
        if first[numbers[piece.name], piece.offset, tuple(piece.values.shape)][0] == peers.rank
    ]


def other_values(
    name: str, offset: tuple[int, ...], one: int, other: int, axis: str | None = None
) -> CheckpointError:
    """The error for a part of a tensor that two ranks have with other values.

    Args:
        name: of the tensor.
        offset: of the part.
        one: rank that has it.
        other: rank that has it too.
        axis: of tensor parallelism, if that is what lies between them.
    """
    numbers = (
        f"Ranks {one} and {other} both have the part of it at {list(offset)}, with other values."
    )
    if axis is not None:
        return CheckpointError(
            f"Ranks along {axis!r} hold different values of {name}, of which each has a copy: the "
            "copies were set otherwise or have drifted apart, and a checkpoint would have those of "
            "one.",
            numbers=numbers,
            write=f"copies that are alike, with dist.broadcast of the parameter along {axis!r} and "
            "the same gradients afterwards; or, where each rank has its own, one parameter that is "
            f'spread over the axis: DTensor.from_local(weights, mesh["{axis}"], [Shard(0)])',
        )
    return CheckpointError(
        f"Ranks hold different values of {name} (experts that each rank has its own of?): a "
        "checkpoint would have those of one.",
        numbers=numbers,
        write="all experts as one parameter, spread over their axis before they are sharded: "
        'DTensor.from_local(weights, mesh["ep"], [Shard(0)])',
    )


def other_layouts(name: str, held: int, cells: int) -> CheckpointError:
    """The error for parts of a tensor that have more cells together, or fewer, than it."""
    return CheckpointError(
        f"Ranks hold {name} in parts that do not fit together.",
        numbers=f"Their parts have {held} cells together, and it has {cells}.",
        write="the same sharding of it on all ranks",
    )
