"""What a model and its optimizer have to keep, by name, and who writes which part of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from mics.checkpoint.layout import MODEL, OPTIMIZER
from mics.checkpoint.manifest import Json
from mics.errors import CheckpointError
from mics.sharding.units import units_on

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True)
class Contents:
    """Tensors (sharded or whole) and other values, by their names in the manifest."""

    tensors: dict[str, torch.Tensor]
    aliases: dict[str, str]
    values: dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that this rank writes."""

    name: str
    offset: tuple[int, ...]
    values: torch.Tensor


def contents_of(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Contents:
    """The state of a model and its optimizer; tensors are those in use, not copies.

    A tied parameter stands once, its other names are aliases. An optimizer without state gets the
    state it would start with, no step taken.
    """
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    values: dict[str, Any] = {}
    firsts: dict[int, str] = {}
    first_of: dict[str, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        first_of[name] = firsts.setdefault(id(param), name)
    for name, value in get_model_state_dict(model).items():
        first = first_of.get(name, name)
        if first != name:
            aliases[MODEL + name] = MODEL + first
        elif isinstance(value, torch.Tensor):
            tensors[MODEL + name] = value
        else:
            values[MODEL + name] = value
    if optimizer is not None:
        fresh = not optimizer.state
        flat: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=FLAT))
        if fresh:
            _uncount_first_step(optimizer)
        for name, value in flat.items():
            kept = tensors if isinstance(value, torch.Tensor) else values
            kept[OPTIMIZER + name] = value
    return Contents(tensors, aliases, values)


def _uncount_first_step(optimizer: torch.optim.Optimizer) -> None:
    """torch makes the state by a step of zero gradients, which bias correction would count."""
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"].zero_()


def pieces_of_this_rank(contents: Contents, model: nn.Module) -> list[Piece]:
    """What this rank writes: every box of every tensor is one rank's, and evenly so.

    The replicas hold the same shards, so a tensor is written by one replica: the one that has the
    fewest bytes so far, largest tensors first. All ranks come to the same answer without asking
    each other. Tensors that are not sharded (buffers, step counts) are rank 0's.
    """
    replicas = _replicas_of_meshes(model)
    loads: dict[int, list[int]] = {}
    mine: dict[str, torch.Tensor] = {}
    largest_first = sorted(contents.tensors.items(), key=lambda item: (-item[1].numel(), item[0]))
    for name, tensor in largest_first:
        if isinstance(tensor, DTensor):
            replica, count = _replica_of(tensor, replicas)
            load = loads.setdefault(count, [0] * count)
            writer = load.index(min(load))
            load[writer] += tensor.numel() * tensor.element_size()
            if replica == writer:
                mine[name] = tensor
        elif not dist.is_initialized() or dist.get_rank() == 0:
            mine[name] = tensor
    pieces = []
    for item in create_default_local_save_plan(mine, is_coordinator=False).items:
        values = find_state_dict_object(mine, item.index).detach()
        assert item.tensor_data is not None
        if values.numel():
            offset = tuple(item.tensor_data.chunk.offsets)
            pieces.append(Piece(item.index.fqn, offset, values))
    return pieces


def partition_of(model: nn.Module) -> int:
    """p of a model: ranks that its first sharded parameter is split over; 1 if none is."""
    for param in model.parameters():
        if isinstance(param, DTensor):
            placements = zip(range(param.device_mesh.ndim), param.placements, strict=True)
            sizes = [
                param.device_mesh.size(dim)
                for dim, placement in placements
                if not isinstance(placement, Replicate)
            ]
            return int(torch.tensor(sizes or [1]).prod())
    return 1


def _replicas_of_meshes(model: nn.Module) -> dict[DeviceMesh, tuple[int, int]]:
    """(replica, number of replicas) of the 1-D meshes that mics shards over."""
    found: dict[DeviceMesh, tuple[int, int]] = {}
    for module in model.modules():
        for unit in units_on(module):
            replicas = unit.groups.replicas
            if replicas is not None:
                found[unit.groups.mesh] = (replicas.rank(), replicas.size())
    return found


def _replica_of(tensor: DTensor, replicas: dict[DeviceMesh, tuple[int, int]]) -> tuple[int, int]:
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


# -- values that are no tensors --------------------------------------------------------------------


def encode_values(values: dict[str, Any]) -> dict[str, Json]:
    """Values as JSON; tuples are marked, so that they come back as tuples.

    Raises:
        CheckpointError: a value that JSON cannot hold.
    """
    return {name: _encode(name, value) for name, value in values.items()}


def decode_values(values: dict[str, Json], names: Iterable[str]) -> dict[str, Any]:
    """Values from JSON, for some names: the reverse of ``encode_values``."""
    return {name: _decode(values[name]) for name in names}


def _encode(name: str, value: Any) -> Json:
    if isinstance(value, tuple):
        return {"tuple": [_encode(name, item) for item in value]}
    if isinstance(value, list):
        return [_encode(name, item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"{name} cannot be kept: checkpoints hold tensors, numbers, text, lists and tuples.",
        numbers=f"It is a {type(value).__name__}.",
        write="it as a buffer, a number, or not at all",
    )


def _decode(value: Json) -> Any:
    if isinstance(value, dict):
        items = value["tuple"]
        assert isinstance(items, list)
        return tuple(_decode(item) for item in items)
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value
