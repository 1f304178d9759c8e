"""Axes of a mesh that are not for data: refused where they would be taken for such.

Hop 2 averages over the first axis of a 2-D mesh, and hop 1 shards over the last one. Over the
ranks of tensor parallelism, or of a second shard axis, either would mix what does not belong
together, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mics import compat
from mics.errors import ShardError, TopologyError

_NOT_OF_DATA = {"tp", "cp", "sp", "ep", "pp", "tensor", "context", "sequence", "expert", "pipeline"}
_SHARDS = {"shard", "fsdp"}
_REPLICATES = {"replicate", "ddp"}


def check_names(mesh: DeviceMesh) -> None:
    """Refuse a 2-D mesh whose names say that it is not (replicate, shard), in this order.

    Raises:
        TopologyError: it is not.
    """
    if mesh.ndim != 2 or mesh.mesh_dim_names is None:
        return
    first, last = (set(name.lower().split("_")) for name in mesh.mesh_dim_names)
    swapped = first & _SHARDS and not first & _REPLICATES
    swapped = swapped or (last & _REPLICATES and not last & _SHARDS)
    if not swapped and not (first | last) & _NOT_OF_DATA:
        return
    raise TopologyError(
        f"The axes {mesh.mesh_dim_names} of a mesh would be taken for (replicate, shard): hop 2 "
        f"would average over {mesh.mesh_dim_names[0]!r}.",
        numbers=f"Its shape is {tuple(mesh.shape)}.",
        write='mesh["replicate", "shard"], or mesh["shard"] alone; the ranks of two shard axes '
        "flattened into one from the start",
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
            write='mics.shard(model, mesh=mesh["replicate", "shard"]) of one mesh with the axes '
            '("replicate", "shard", "tp"), whose mesh["tp"] the model was made parallel on',
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
                write='mesh["replicate", "shard"] of the mesh whose other axis the model is on',
            )


def unsharded(modules: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of modules that are no unit's yet, by name."""
    ours = {
        id(param)
        for module in modules
        for inner in module.modules()
        for group in compat.param_groups(inner)
        for param in compat.sharded_params(group)
    }
    named = (pair for module in modules for pair in module.named_parameters())
    return {name: param for name, param in named if id(param) not in ours}


def _spelled(mesh: DeviceMesh) -> str:
    return f"{mesh.mesh_dim_names or 'a mesh'} of ranks {mesh.mesh.tolist()}"
