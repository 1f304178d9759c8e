"""What a model and its optimizers have to keep, by name."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from mics.checkpoint.averages import averages_of
from mics.checkpoint.layout import AVERAGE_UPDATES, MODEL
from mics.checkpoint.manifest import PLAIN, Json
from mics.checkpoint.names import frozen_names, parameter_names, plain_names
from mics.checkpoint.optimizers import Optimizers, list_optimizers, optimizer_contents
from mics.checkpoint.values import encode
from mics.errors import CheckpointError
from mics.quantities import dtype_name
from mics.sharding.average import EMA
from mics.sharding.same_start import fingerprint
from mics.sharding.tensor_parts import kind_of, values_of


@dataclass(frozen=True)
class Contents:
    """Tensors (sharded or whole) and other values, as JSON, by their names in the manifest.

    ``state`` is what ``state_dict`` of the model returned, with the names that ``keys`` gives the
    entries in the manifest. ``forms`` says what tensors of optimizers are (``Entry.form``), and
    ``alone`` names the parameters that are not sharded. ``left_out`` are the parameters that are
    not kept, which ``tensors`` does not have.
    """

    tensors: dict[str, torch.Tensor]
    aliases: dict[str, str]
    values: dict[str, Json]
    forms: dict[str, str]
    state: dict[str, Any]
    keys: dict[str, str]
    alone: set[str]
    left_out: dict[str, torch.Tensor]


def contents_of(
    model: nn.Module,
    optimizer: Optimizers | None,
    ema: EMA | None = None,
    *,
    without: Collection[str] = (),
) -> Contents:
    """The state of a model, its optimizers and its average; tensors are those in use, not copies.

    A tied parameter stands once, its other names are aliases. Names are those that the model has
    without wrappers. Nothing is made for what has no state, and nothing is changed.

    Args:
        model: sharded or not.
        optimizer: its optimizer, or several.
        ema: its moving average.
        without: parameters that are left out, by their names in the manifest.

    Raises:
        CheckpointError: something cannot be kept, or an optimizer or average is of another model.
    """
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    values: dict[str, Json] = {}
    left_out: dict[str, torch.Tensor] = {}
    first_of = parameter_names(model)[0]
    frozen = frozen_names(model)
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
        elif name in without and isinstance(value, torch.Tensor):
            left_out[name] = value
        elif isinstance(value, torch.Tensor):
            tensors[name] = _plain(name, value, frozen=name in frozen)
        else:
            values[name] = encode(name, value)
    alone = {n for n in tensors if n.removeprefix(MODEL) in first_of} - _sharded(tensors)
    kept = optimizer_contents(model, list_optimizers(optimizer))
    tensors |= kept.tensors
    values |= kept.values
    if ema is not None:
        tensors |= averages_of(ema, model)
        values[AVERAGE_UPDATES] = ema.updates
    return Contents(tensors, aliases, values, kept.forms, state, keys, alone, left_out)


def _plain(name: str, tensor: torch.Tensor, *, frozen: bool) -> torch.Tensor:
    """A tensor without the library's type around its values, in the same memory.

    Raises:
        CheckpointError: its values are not one tensor of its shape.
    """
    values = values_of(tensor)
    if values is None:
        raise CheckpointError(
            f"{name} cannot be kept: its values are not one tensor of its shape and dtype.",
            numbers=f"It is {tuple(tensor.shape)} {dtype_name(tensor.dtype)} {kind_of(tensor)}.",
            write="mics.save(..., frozen=False), which leaves out what does not train, and a load "
            "of what that wrote"
            if frozen
            else "requires_grad_(False) on it and mics.save(..., frozen=False), or the parameter "
            "in a dtype of torch",
        )
    return values


def facts_of_contents(contents: Contents) -> dict[str, list[str]]:
    """What all ranks must have in common for their parts to make up one checkpoint, as lines.

    Buffers and extra states may differ, as in any data-parallel training; rank 0's are kept.
    Parameters that are not sharded may not: they could be experts that each rank has its own of.
    State that is not sharded may not: it could be that of a shard.
    """
    state, alone, params = [], [], []
    for name, tensor in contents.tensors.items():
        whole = isinstance(tensor, DTensor) or not name.startswith(MODEL)
        state.append(f"{name} {tensor.dtype} {list(tensor.shape)}" if whole else name)
        if contents.forms.get(name) == PLAIN:
            alone.append(f"{name} {int(fingerprint(tensor)):x}")
        if name in contents.alone:
            params.append(f"{name} {int(fingerprint(tensor)):x}")
    for name, value in contents.values.items():
        state.append(name if name.startswith(MODEL) else f"{name} = {json.dumps(value)}")
    return {
        "what is to be saved": state,
        "frozen parameters that are left out": list(contents.left_out),
        "optimizer state that is not sharded": alone,
        "parameters that are not sharded": params,
    }


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


def _sharded(tensors: Mapping[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
