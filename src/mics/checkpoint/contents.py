"""What a model and its optimizers have to keep, by name, and who writes which part of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from mics.checkpoint.layout import MODEL
from mics.checkpoint.manifest import PLAIN, Json
from mics.checkpoint.names import parameter_names, plain_names
from mics.checkpoint.optimizers import Optimizers, list_optimizers, optimizer_contents
from mics.checkpoint.values import encode
from mics.errors import CheckpointError
from mics.quantities import dtype_name
from mics.sharding.tensor_parts import kind_of, values_of
from mics.sharding.units import units_on


@dataclass(frozen=True)
class Contents:
    """Tensors (sharded or whole) and other values, as JSON, by their names in the manifest.

    ``state`` is what ``state_dict`` of the model returned, with the names that ``keys`` gives the
    entries in the manifest. ``forms`` says what tensors of optimizers are (``Entry.form``).
    """

    tensors: dict[str, torch.Tensor]
    aliases: dict[str, str]
    values: dict[str, Json]
    forms: dict[str, str]
    state: dict[str, Any]
    keys: dict[str, str]


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that this rank writes."""

    name: str
    offset: tuple[int, ...]
    values: torch.Tensor


def contents_of(model: nn.Module, optimizer: Optimizers | None) -> Contents:
    """The state of a model and its optimizers; tensors are those in use, not copies.

    A tied parameter stands once, its other names are aliases. Names are those that the model has
    without wrappers. Nothing is made for what has no state, and nothing is changed.

    Raises:
        CheckpointError: something cannot be kept, or an optimizer is of another model.
    """
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    values: dict[str, Json] = {}
    first_of = parameter_names(model)[0]
    with torch.no_grad():
        state = model.state_dict()
    keys = {key: MODEL + name for key, name in plain_names(model, state).items()}
    known = set(keys.values())
    for key, value in state.items():
        name = keys[key]
        plain = name.removeprefix(MODEL)
        first = first_of.get(plain, plain)
        if first != plain and MODEL + first in known:
            aliases[name] = MODEL + first
        elif isinstance(value, torch.Tensor):
            tensors[name] = _plain(name, value)
        else:
            values[name] = encode(name, value)
    kept = optimizer_contents(model, list_optimizers(optimizer))
    return Contents(tensors | kept.tensors, aliases, values | kept.values, kept.forms, state, keys)


def _plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without the library's type around its values, in the same memory.

    Raises:
        CheckpointError: its values are not one tensor of its shape.
    """
    values = values_of(tensor)
    if values is None:
        raise CheckpointError(
            f"{name} cannot be kept: its values are not one tensor of its shape and dtype.",
            numbers=f"It is {tuple(tensor.shape)} {dtype_name(tensor.dtype)} {kind_of(tensor)}.",
            write="the adapters alone, or the parameter in a dtype of torch",
        )
    return values


def facts_of_contents(contents: Contents) -> dict[str, list[str]]:
    """What all ranks must have in common for their parts to make up one checkpoint, as lines.

    Buffers and extra states may differ, as in any data-parallel training; rank 0's are kept. State
    of a sharded parameter that is not sharded may not: it could be that of a shard.
    """
    state, alone = [], []
    for name, tensor in contents.tensors.items():
        whole = isinstance(tensor, DTensor) or not name.startswith(MODEL)
        state.append(f"{name} {tensor.dtype} {list(tensor.shape)}" if whole else name)
        if contents.forms.get(name) == PLAIN:
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            alone.append(f"{name} {hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]}")
    for name, value in contents.values.items():
        state.append(name if name.startswith(MODEL) else f"{name} = {json.dumps(value)}")
    return {"what is to be saved": state, "optimizer state that is not sharded": alone}


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
