"""A topology as process groups: the ("replicate", "shard") mesh and the stage groups.

[Note: rank order]
FSDP2 takes a parameter's shard index from ``group.rank()``, DTensor and the distributed checkpoint
take it from the mesh coordinate. Process groups sort their ranks, meshes do not. On a permuted mesh
the two differ: training looks right and the checkpoint is corrupt without a word. So every group
must list its ranks in ascending order, in the mesh's order; this file refuses anything else.
"""

from __future__ import annotations

import socket
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mics.errors import TopologyError
from mics.ranks.agreement import check_agreement, gather_text
from mics.ranks.device import communication_device, default_device_type
from mics.ranks.issuing import make_group
from mics.ranks.joining import JOIN_SECONDS, join, make_world
from mics.ranks.launcher import ranks_per_node_told, read_launch
from mics.ranks.whereabouts import during, world_group
from mics.topology import Ranks, Topology, has_two_stages, nodes_of
from mics.version import __version__

T = TypeVar("T")


@dataclass(frozen=True)
class StageGroups:
    """The process groups of the two stages, as this rank sees them."""

    inter: dist.ProcessGroup
    intra: dist.ProcessGroup


@dataclass
class NodeLayout:
    """How the ranks that share a shard group sit on nodes, and the groups made for them."""

    gpus_per_node: int
    stages: dict[Ranks, StageGroups | None] = field(default_factory=dict)
    post_forward: dict[int, DeviceMesh] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Groups:
    """Everything a communication unit needs to know about who it talks to.

    ``replicas`` is ``None`` when there is only one replica (p = world) or the mesh is 1-D.
    """

    whole: DeviceMesh  # as it was given, 1-D or 2-D
    mesh: DeviceMesh  # 1-D, the shard axis
    shard: dist.ProcessGroup
    replicas: dist.ProcessGroup | None
    layout: NodeLayout

    @property
    def gpus_per_node(self) -> int:
        """k, ranks joined by the fast link."""
        return self.layout.gpus_per_node

    @property
    def axes(self) -> list[dist.ProcessGroup]:
        """The groups of the mesh's axes, innermost first; together they reach every rank of it."""
        return [self.shard] if self.replicas is None else [self.shard, self.replicas]

    @property
    def num_replicas(self) -> int:
        """R."""
        return 1 if self.replicas is None else self.replicas.size()

    @property
    def device(self) -> torch.device:
        """Where this rank's communication buffers live."""
        return device_of(self.mesh)


class PerMesh(Generic[T]):
    """What there is one of per partition group: made when first asked for, gone with the group.

    Process groups end with ``destroy_process_group``; nothing may outlive or revive them.

    Args:
        make: makes one; called on every rank of the mesh at the same point of the program.
    """

    def __init__(self, make: Callable[[Groups], T]) -> None:
        self._make = make
        self._made: weakref.WeakKeyDictionary[dist.ProcessGroup, T] = weakref.WeakKeyDictionary()

    def __call__(self, groups: Groups) -> T:
        """Return the one of these groups."""
        if groups.shard not in self._made:
            self._made[groups.shard] = self._make(groups)
        return self._made[groups.shard]


_layouts: weakref.WeakKeyDictionary[dist.ProcessGroup, NodeLayout] = weakref.WeakKeyDictionary()


@during("mics.init_mesh")
def init_mesh(
    *,
    partition: int | Literal["auto"] = "auto",
    gpus_per_node: int | None = None,
    device_type: str | None = None,
) -> DeviceMesh:
    """Build the 2-D ``("replicate", "shard")`` mesh of MiCS for this job.

    Reads torchrun's, Slurm's or MPI's variables and initialises ``torch.distributed`` if that has
    not been done. Every rank calls it with the same arguments.

    Args:
        partition: p, ranks per partition group; ``"auto"`` is one node, the largest group that
            never crosses the slow link (``mics.shard`` chooses by the model's memory instead).
        gpus_per_node: k; by default what the launcher says. May be given smaller, so that the
            ranks of one machine stand for several nodes.
        device_type: "cuda", "cpu", ...; by default the accelerator, else the CPU.

    Returns:
        A plain DeviceMesh of shape (R, p), to be passed to ``fully_shard`` or ``mics.shard``.

    Raises:
        TopologyError: p or k do not fit, nodes differ, or ranks are not in node order.
        DisagreementError: ranks run different versions or were given different arguments.
    """
    world, launched_per_node = start(device_type)
    device_type = device_type or default_device_type()
    k = gpus_per_node or launched_per_node
    check_agreement(
        {
            "version": versions(),
            "arguments of init_mesh": [
                f"partition={partition}",
                f"gpus_per_node={gpus_per_node}",
                f"device_type={device_type}",
            ],
            "ranks per node": [str(k)],
        },
        [world_group()],
        communication_device(device_type),
    )
    topology = Topology.from_world(world, k, k if partition == "auto" else partition)
    return mesh_of(topology, device_type)


def mesh_of(topology: Topology, device_type: str | None = None) -> DeviceMesh:
    """Build the ("replicate", "shard") mesh of a topology that all ranks have agreed on.

    Collective over the world.

    Raises:
        TopologyError: the ranks do not sit on nodes as the topology says.
    """
    device_type = device_type or default_device_type()
    hosts = gather_text(socket.gethostname(), world_group(), communication_device(device_type))
    _check_hosts(hosts, topology.gpus_per_node)
    mesh = init_device_mesh(
        device_type,
        (topology.replicas, topology.partition),
        mesh_dim_names=("replicate", "shard"),
    )
    groups_of(mesh, gpus_per_node=topology.gpus_per_node)
    return mesh


def versions() -> list[str]:
    """What runs here, to be compared between ranks."""
    return [f"torch {torch.__version__}", f"mics {__version__}"]


def start(device_type: str | None = None) -> tuple[int, int]:
    """Initialise ``torch.distributed`` from the launcher's variables, unless that is done.

    Returns:
        The number of ranks, and the ranks per node as the launcher tells it (all of them, if
        there is no launcher but a process group).

    Raises:
        TopologyError: no launcher started this process and there is no process group.
        MicsError: the other ranks did not come, or something else is wrong with where they meet.
    """
    if not dist.is_initialized():
        launch = read_launch()
        if launch is None:
            raise TopologyError(
                "This process was started by no launcher that mics knows.",
                numbers="None of RANK (torchrun), SLURM_PROCID, OMPI_COMM_WORLD_RANK, PMI_RANK "
                "is set.",
                write="torchrun --nproc-per-node <GPUs> script.py",
            )
        store = join(launch, device_type or default_device_type(), JOIN_SECONDS)
        make_world(store, launch, None, None)
    return dist.get_world_size(), launched_ranks_per_node()


def launched_ranks_per_node() -> int:
    """Ranks per node as the launcher tells it; all of them, if there was no launcher."""
    return ranks_per_node_told() or dist.get_world_size()


def groups_of(mesh: DeviceMesh, *, gpus_per_node: int | None = None) -> Groups:
    """The groups behind a 1-D mesh (shard) or a 2-D mesh (replicate, shard).

    The first call for a mesh creates nothing but checks the rank order; stage groups are made by
    ``stage_groups``. Any mesh will do, the user's own too.

    Raises:
        TopologyError: the mesh has another number of axes, or an order FSDP2 would corrupt.
    """
    if mesh.ndim not in (1, 2):
        raise TopologyError(
            f"The mesh has {mesh.ndim} axes; sharding needs 1 (shard) or 2 (replicate, shard).",
            numbers=f"Its shape is {tuple(mesh.shape)}, its axes are {mesh.mesh_dim_names}.",
            write='mesh["replicate", "shard"]',
        )
    for axis in range(mesh.ndim):
        _check_rank_order(mesh, axis)
    shard_axis = mesh.ndim - 1
    shard = mesh.get_group(shard_axis)
    layout = _layouts.get(shard)
    if layout is None:
        layout = _layouts[shard] = NodeLayout(gpus_per_node or launched_ranks_per_node())
    elif gpus_per_node not in (None, layout.gpus_per_node):
        raise TopologyError(
            f"This mesh was set up with gpus_per_node = {layout.gpus_per_node}, now it is "
            f"{gpus_per_node}.",
            write=f"gpus_per_node={layout.gpus_per_node}, or leave it out",
        )
    replicas = mesh.get_group(0) if mesh.ndim == 2 and mesh.size(0) > 1 else None
    return Groups(mesh, _shard_axis_of(mesh), shard, replicas, layout)


def stage_groups(groups: Groups, ranks: Ranks) -> StageGroups | None:
    """The stage groups of a gathered group, made once.

    Collective over ``ranks`` the first time.

    Returns:
        ``None`` when ``ranks`` share one node, or sit on nodes unevenly: there are no two stages.
    """
    if ranks in groups.layout.stages:
        return groups.layout.stages[ranks]
    if not has_two_stages(ranks, groups.gpus_per_node):
        groups.layout.stages[ranks] = None
        return None
    rows = nodes_of(ranks, groups.gpus_per_node)
    rank = dist.get_rank()
    row = next(row for row in rows if rank in row)
    column = tuple(other[row.index(rank)] for other in rows)
    # Only members call, so that making one group is not a matter for the whole cluster.
    made = StageGroups(
        inter=make_group(column, "mics_inter"),
        intra=make_group(row, "mics_intra"),
    )
    groups.layout.stages[ranks] = made
    return made


def post_forward_mesh(groups: Groups, size: int) -> DeviceMesh:
    """The mesh ``reshard_after_forward=size`` reshards to: shape (ranks / size, size), made once.

    Collective over the partition group the first time.
    """
    if size not in groups.layout.post_forward:
        rows = groups.whole.mesh.view(-1, size)
        rank = dist.get_rank()
        row, column = (int(i) for i in (rows == rank).nonzero()[0])
        shard = make_group(rows[row].tolist(), "mics_post_forward")
        others = make_group(rows[:, column].tolist(), "mics_unused")
        groups.layout.post_forward[size] = DeviceMesh.from_group(
            [others, shard],
            groups.whole.device_type,
            mesh=rows,
            mesh_dim_names=("post_forward_replicate", "post_forward_shard"),
        )
    return groups.layout.post_forward[size]


def axes_beside(groups: Groups, mesh: DeviceMesh) -> dict[int, dist.ProcessGroup]:
    """The axes of a parameter's mesh that are none of the data, each with its group.

    Told by their ranks: torch gives parameters the first mesh of a process that equals theirs,
    whose groups are others.

    Args:
        groups: of the data.
        mesh: that a parameter sharded over them is on.
    """
    if mesh.ndim == 1:  # what a parameter is sharded over; asked for all of them in every step
        return {}
    data = {ranks_of(group) for group in groups.axes}
    found = enumerate(mesh.get_all_groups())
    return {axis: group for axis, group in found if ranks_of(group) not in data}


def ranks_of(group: dist.ProcessGroup) -> Ranks:
    """World ranks of a process group, in group-rank order."""
    return tuple(dist.get_process_group_ranks(group))


def device_of(mesh: DeviceMesh) -> torch.device:
    """The device this rank communicates on."""
    return communication_device(mesh.device_type)


def _shard_axis_of(mesh: DeviceMesh) -> DeviceMesh:
    if mesh.ndim == 1:
        return mesh
    if mesh.mesh_dim_names is None:
        raise TopologyError(
            "A 2-D mesh needs names for its axes.",
            numbers=f"Its shape is {tuple(mesh.shape)}.",
            write='init_device_mesh(..., mesh_dim_names=("replicate", "shard"))',
        )
    return mesh[mesh.mesh_dim_names[1]]


def _check_rank_order(mesh: DeviceMesh, axis: int) -> None:
    """Refuse a mesh on which group rank and mesh coordinate differ. See [Note: rank order]."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise TopologyError(
            f"Rank {dist.get_rank()} is not in the mesh it shards with.",
            numbers=f"The mesh holds ranks {mesh.mesh.flatten().tolist()}.",
            write="call it only on the ranks of the mesh",
        )
    index: list[int | slice] = list(coordinate)
    index[axis] = slice(None)
    in_mesh = mesh.mesh[tuple(index)].tolist()
    in_group = list(ranks_of(mesh.get_group(axis)))
    if in_mesh == in_group == sorted(in_group):
        return
    name = mesh.mesh_dim_names[axis] if mesh.mesh_dim_names else str(axis)
    raise TopologyError(
        f"The ranks of mesh axis {name!r} are not in ascending order; FSDP2 would number the "
        "shards one way and checkpoints another.",
        numbers=f"The mesh says {in_mesh}, the process group {in_group}.",
        write="mics.init_mesh(partition=...), or a mesh over arange(world) and ranks placed by "
        "the launcher",
    )


def _check_hosts(hosts: list[str], gpus_per_node: int) -> None:
    """Ranks of one node must share a host: node-major order, equal nodes."""
    for first in range(0, len(hosts), gpus_per_node):
        node = hosts[first : first + gpus_per_node]
        if len(set(node)) > 1:
            counts = {host: hosts.count(host) for host in dict.fromkeys(hosts)}
            placed = ", ".join(f"{host}: {n}" for host, n in counts.items())
            if len(set(counts.values())) > 1:
                raise TopologyError(
                    "Nodes have different numbers of ranks; partition groups need equal nodes.",
                    numbers=f"Ranks per host: {placed}.",
                    write="the same --nproc-per-node on every node",
                )
            raise TopologyError(
                f"Ranks {first} to {first + gpus_per_node - 1} should share a node, but do not: "
                "ranks are not numbered node by node.",
                numbers=f"Their hosts are {', '.join(node)} ({placed}).",
                write="torchrun, or srun --distribution=block, or the true gpus_per_node",
            )
