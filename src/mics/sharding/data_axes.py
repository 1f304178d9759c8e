"""Which axes of a mesh the data is on: those that a user names, or all of a mesh of one or two.

Ranks along several axes may all see other data and hold the same parameters, as those of context
parallelism do: such axes are flattened into one, as FSDP2 does it, in the order of the mesh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mics import compat
from mics.errors import ShardError
from mics.quantities import first_of
from mics.ranks.mesh import Groups, groups_of
from mics.sharding.other_axes import check_names, refuse_overlap


@dataclass(frozen=True)
class Axes:
    """A mesh that all parameters are on already, and which of its axes the data is on."""

    mesh: DeviceMesh
    dims: Any  # torch's DataParallelMeshDims


def groups_on(mesh: DeviceMesh, dims: Any, gpus_per_node: int | None) -> Groups:
    """The groups of a mesh, or of those of its axes that are named.

    Args:
        mesh: any if ``dims`` are given, else of one axis (shard) or two (replicate, shard).
        dims: torch's ``DataParallelMeshDims``, or ``None``.
        gpus_per_node: as ``groups_of``.

    Raises:
        ShardError: the names are none, twice the same or not the mesh's.
        TopologyError: an axis would be taken for what it is not, or its ranks are out of order.
    """
    if dims is None:
        check_names(mesh)
        return groups_of(mesh, gpus_per_node=gpus_per_node)
    shard, replicate = tuple(dims.shard_names), tuple(dims.replicate_names)
    names = mesh.mesh_dim_names or ()
    if not shard:
        raise _wrong(mesh, dims, "dp_mesh_dims names no axis to shard over.")
    if len({*shard, *replicate}) < len(shard) + len(replicate):
        raise _wrong(mesh, dims, "dp_mesh_dims names an axis twice.")
    if not {*shard, *replicate} <= set(names):
        raise _wrong(mesh, dims, "dp_mesh_dims names an axis that the mesh has not.")
    for together in (shard, replicate):
        if [name for name in names if name in together] != list(together):
            raise _wrong(
                mesh, dims, "dp_mesh_dims names axes in another order than that of the mesh."
            )
    axes = [compat.flattened(mesh, together) for together in (replicate, shard) if together]
    return groups_of(compat.side_by_side(axes), gpus_per_node=gpus_per_node)


def axes_on(
    params: Mapping[str, nn.Parameter], mesh: DeviceMesh, dims: Any, groups: Groups
) -> Axes | None:
    """Whether parameters are on all axes of a mesh, as torch's ``dp_mesh_dims`` wants them.

    Args:
        params: those to be sharded, by name.
        mesh: with all axes.
        dims: which of them the data is on; ``None`` if the mesh has no others.
        groups: of these axes.

    Returns:
        ``None`` if they are plain, or on other axes of it alone (tensor parallelism).

    Raises:
        ShardError: only some are, or torch cannot flatten the axes, or ranks that hold different
            parts of one would be taken for replicas or shards of it.
    """
    there = [name for name, param in params.items() if dims is not None and _is_on(param, mesh)]
    refuse_overlap(
        {name: param for name, param in params.items() if name not in there}, groups.whole
    )
    if not there:
        return None
    others = [name for name in params if name not in there]
    if others:
        raise ShardError(
            "Some parameters are on all axes of the mesh, some are not.",
            numbers=f"{first_of(there)} on {mesh.mesh_dim_names}, {first_of(others)} not.",
            write="distribute_module(model, mesh) of all of it; or parallelize_module on the "
            'other axes alone, as mesh["tp"]',
        )
    names = mesh.mesh_dim_names or ()
    places = [names.index(name) for name in dims.shard_names]
    if places != list(range(places[0], places[0] + len(places))):
        raise ShardError(
            "Parameters on all axes of a mesh can be sharded over axes side by side only.",
            numbers=f"shard={dims.shard!r} of {names}.",
            write="a mesh with these axes side by side",
        )
    return Axes(mesh, dims)


def _is_on(param: nn.Parameter, mesh: DeviceMesh) -> bool:
    return isinstance(param, DTensor) and param.device_mesh == mesh


def _wrong(mesh: DeviceMesh, dims: Any, what: str) -> ShardError:
    return ShardError(
        what,
        numbers=f"It names shard={dims.shard!r}, replicate={dims.replicate!r}; the mesh has "
        f"{mesh.mesh_dim_names}.",
        write='dp_mesh_dims=DataParallelMeshDims(shard=("dp_shard", "cp"), '
        'replicate="dp_replicate") with names of the mesh, in its order',
    )
