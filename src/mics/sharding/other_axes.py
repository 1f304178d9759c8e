"""Axes of a mesh that are not for data: refused where they would be taken for such.

Hop 2 averages over the first axis of a 2-D mesh, and hop 1 shards over the last one. Over the
ranks of tensor parallelism, or of a second shard axis, either would mix what does not belong
together, without a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mics import compat
from mics.errors import ShardError, TopologyError

# What the parts of an axis' name say of the ranks along it.
_SHARDS = {"shard", "fsdp", "efsdp"}
_REPLICATES = {"replicate", "ddp"}
_DATA = {*_SHARDS, *_REPLICATES, "dp", "data"}
_OTHER_TOKENS = {"cp", "sp", "context", "sequence", "seq", "ulysses", "ring"}  # same parameters
_OTHER_EXPERTS = {"ep", "expert", "experts"}
_OTHER_PARTS = {"tp", "etp", "pp", "mp", "tensor", "pipeline", "model", "stage"}
_ALL_OTHERS = _OTHER_TOKENS | _OTHER_EXPERTS | _OTHER_PARTS


def check_names(mesh: DeviceMesh) -> None:
    """Refuse a mesh whose names say that it is not (shard) or (replicate, shard), in this order.

    Axes that are flattened ("dp_shard_cp") are for data if their name says so first of all.

    Raises:
        TopologyError: it is not.
    """
    names = mesh.mesh_dim_names
    if names is None:
        return
    if mesh.ndim > 2:
        raise TopologyError(
            f"The mesh has {mesh.ndim} axes; sharding needs 1 (shard) or 2 (replicate, shard).",
            numbers=f"Its shape is {tuple(mesh.shape)}, its axes are {names}.",
            write=_named(names),
        )
    others = [name for name in names if _is_other(name)]
    if not others and not _is_swapped(*map(_parts, names)):
        return
    if mesh.ndim == 1:
        raise TopologyError(
            f"The axis {names[0]!r} of a mesh would be taken for (shard): its ranks would hold "
            "parts of each parameter.",
            numbers=f"Its shape is {tuple(mesh.shape)}.",
            write=f"{_named(names)} if they see other data and hold the same parameters, "
            'else mesh["shard"]',
        )
    raise TopologyError(
        f"The axes {names} of a mesh would be taken for (replicate, shard): hop 2 "
        f"would average over {names[0]!r}.",
        numbers=f"Its shape is {tuple(mesh.shape)}.",
        write='mesh["replicate", "shard"], or mesh["shard"] alone; or, of the whole mesh, '
        f"{_named(compat.root_of(mesh).mesh_dim_names or names)}",
    )


def _parts(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))


def _is_other(name: str) -> bool:
    """Whether a name says that ranks along the axis are not for data."""
    parts = _parts(name)
    return bool(parts & _OTHER_PARTS) or (bool(parts & _ALL_OTHERS) and not parts & _DATA)


def axis_of_parts(mesh: DeviceMesh, one: int, other: int) -> str | None:
    """The axis between two ranks, if its name says that ranks along it have parts of a model.

    Args:
        mesh: cut out of one that may have the axis.
        one: rank in the job.
        other: rank in the job.

    Returns:
        ``None`` too if it has another name, the mesh has not both ranks, or several axes lie
        between them.
    """
    root = compat.root_of(mesh)
    places = [(root.mesh == rank).nonzero().tolist() for rank in (one, other)]
    if root.mesh_dim_names is None or not all(places):
        return None
    (here,), (there,) = places
    between = [name for name, i, j in zip(root.mesh_dim_names, here, there, strict=True) if i != j]
    return between[0] if len(between) == 1 and _parts(between[0]) & _OTHER_PARTS else None


def axes_beside_data(mesh: DeviceMesh, *, parts: bool) -> list[str]:
    """The axes, by their names, along which ranks see the same samples.

    Args:
        mesh: of the model's data, or cut out of one that has such axes.
        parts: also those along which ranks hold parts of a model.
    """
    root = compat.root_of(mesh)
    others = _OTHER_TOKENS | (_OTHER_PARTS if parts else set())
    names = root.mesh_dim_names or ()
    return [n for axis, n in enumerate(names) if _parts(n) & others and root.size(axis) > 1]


def _is_swapped(first: set[str], last: set[str] | None = None) -> bool:
    if last is None:
        return False
    shards_first = first & _SHARDS and not first & _REPLICATES
    return bool(shards_first or (last & _REPLICATES and not last & _SHARDS))


def _named(names: Sequence[str]) -> str:
    """What to write for the data axes of a mesh, as far as their names tell which they are."""
    parts = {name: _parts(name) for name in names}
    replicate = [n for n in names if parts[n] & _REPLICATES and not parts[n] & _SHARDS]
    shard = [n for n in names if n not in replicate and parts[n] & (_DATA | _OTHER_TOKENS)]
    shard = [n for n in shard if not parts[n] & _OTHER_PARTS]
    if len(shard) == 1 and len(names) > 1 and not _is_other(shard[0]):
        return f"mesh[{', '.join(_quoted([*replicate, *shard]))}]"
    if not shard:
        return 'mesh["replicate", "shard"]'
    said = [f"shard={_one_or_several(shard)}"]
    said += [f"replicate={_one_or_several(replicate)}"] if replicate else []
    return f"mesh=mesh, dp_mesh_dims=DataParallelMeshDims({', '.join(said)})"


def _one_or_several(names: Sequence[str]) -> str:
    quoted = ", ".join(_quoted(names))
    return quoted if len(names) == 1 else f"({quoted})"


def _quoted(names: Sequence[str]) -> list[str]:
    return [f'"{name}"' for name in names]


def refuse_left_out(mesh: DeviceMesh, params: Sequence[nn.Parameter]) -> None:
    """Refuse a model whose gradients nobody reduces over ranks that see other tokens.

    Args:
        mesh: the largest that the model is sharded and replicated over.
        params: sharded over it; what they are on besides is reduced by torch.

    Raises:
        ShardError: the mesh was cut out of one with such an axis, which it lacks.
    """
    root = compat.root_of(mesh)
    here = root.get_coordinate()
    if root is mesh or root.mesh_dim_names is None or here is None:
        return
    reduced = set(mesh.mesh.flatten().tolist())
    for param in params:
        if isinstance(param, DTensor):
            reduced |= set(param.device_mesh.mesh.flatten().tolist())
    for axis, name in enumerate(root.mesh_dim_names):
        along = root.mesh.movedim(axis, -1)[tuple(c for i, c in enumerate(here) if i != axis)]
        if not _parts(name) & _OTHER_TOKENS or set(along.tolist()) <= reduced:
            continue
        raise ShardError(
            f"Ranks along {name!r} see other tokens of the same sequences, and nobody would "
            "reduce gradients over them: their weights would drift apart.",
            numbers=f"The mesh has the axes {root.mesh_dim_names} of {tuple(root.shape)} ranks, "
            f"the model is sharded over {mesh.mesh_dim_names} of them.",
            write=_named(root.mesh_dim_names),
        )


def refuse_sharded_over_all(model: nn.Module) -> None:
    """Refuse a mesh over all ranks for parameters that are on a mesh already.

    Raises:
        ShardError: there are some.
    """
    for name, param in unsharded([model]).items():
        if not isinstance(param, DTensor):
            continue
        raise ShardError(
            "The model's parameters are on a mesh of their own (tensor parallelism?), whose ranks "
            "a mesh over all ranks would take for replicas or shards.",
            numbers=f"{name} is on {_spelled(param.device_mesh)}.",
            write=_around(param.device_mesh),
        )


def refuse_overlap(params: Mapping[str, nn.Parameter], mesh: DeviceMesh) -> None:
    """Refuse a mesh that shares more than this rank with a mesh that parameters are on.

    Args:
        params: those to be sharded over it, by name.
        mesh: with its replicate axis.

    Raises:
        ShardError: it does.
    """
    ours = set(mesh.mesh.flatten().tolist())
    for name, param in params.items():
        if not isinstance(param, DTensor):
            continue
        shared = sorted(ours & set(param.device_mesh.mesh.flatten().tolist()))
        if len(shared) > 1:
            raise ShardError(
                "Ranks that hold different parts of a parameter would be taken for replicas or "
                "shards of it.",
                numbers=f"{name} is on {_spelled(param.device_mesh)}; ranks {shared} of it are "
                "in the mesh to shard over.",
                write=_around(param.device_mesh),
            )


def refuse_parallel_on_meta(params: Mapping[str, nn.Parameter]) -> None:
    """Refuse parts of parameters that have no values: their initialisers know the whole ones.

    Raises:
        ShardError: there are some.
    """
    for name, param in params.items():
        if isinstance(param, DTensor) and param.is_meta:
            raise ShardError(
                "The model was made parallel on the meta device: its initialisers would set each "
                "rank's part as if it were the whole.",
                numbers=f"{name} is on {_spelled(param.device_mesh)}.",
                write="a model with values before parallelize_module; or mics.fully_shard of its "
                'blocks and itself, then model.to_empty(device="cuda") and your initialisation',
            )


def refuse_parallel_resharding(
    params: Mapping[str, nn.Parameter], reshard_after_forward: bool | int | None, partition: int
) -> None:
    """Refuse to reshard parts of parameters to fewer ranks; torch raises in the first forward.

    Args:
        params: those to be sharded, by name.
        reshard_after_forward: as ``fully_shard``.
        partition: p.

    Raises:
        ShardError: it was asked.
    """
    if reshard_after_forward in (None, True, False, partition):  # 1 is True
        return
    for name, param in params.items():
        if isinstance(param, DTensor):
            raise ShardError(
                f"reshard_after_forward = {reshard_after_forward} keeps parameters on fewer ranks "
                "than the partition group, which torch cannot do with parts of them.",
                numbers=f"{name} is on {_spelled(param.device_mesh)}, the partition group has "
                f"{partition} ranks.",
                write="reshard_after_forward=True, or False",
            )


def unsharded(modules: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of modules that are no unit's yet, by name.

    Names in one of several modules begin with its number, since others may have the same.
    """
    ours = {
        id(param)
        for module in modules
        for inner in module.modules()
        for group in compat.param_groups(inner)
        for param in compat.sharded_params(group)
    }
    prefixes = [f"{number}." if len(modules) > 1 else "" for number in range(len(modules))]
    return {
        prefix + name: param
        for prefix, module in zip(prefixes, modules, strict=True)
        for name, param in module.named_parameters()
        if id(param) not in ours
    }


def _around(mesh: DeviceMesh) -> str:
    """Which mesh to give for a model that is on one of its axes already."""
    names = compat.root_of(mesh).mesh_dim_names or ()
    data = [name for name in names if name not in (mesh.mesh_dim_names or ())]
    if data:
        given = _named(data)
        if given.startswith("mesh["):
            given = f"mesh={given}"
        return f"mics.shard(model, {given}) of the mesh with the axes {names}"
    return (
        'mics.shard(model, mesh=mesh["replicate", "shard"]) of one mesh with the axes '
        '("replicate", "shard", "tp"), whose mesh["tp"] the model was made parallel on'
    )


def _spelled(mesh: DeviceMesh) -> str:
    return f"{mesh.mesh_dim_names or 'a mesh'} of ranks {mesh.mesh.tolist()}"
