"""Scales of float8 gathers, all agreed on at once after an optimizer step."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mics import compat
from mics.communication.apart import Message, Seen, count, messages_of
from mics.communication.guard import watch
from mics.errors import ConfigError
from mics.ranks.mesh import ranks_of
from mics.sharding.belonging import units_by_param
from mics.traffic import StageMessage


def precompute_scales(model: nn.Module) -> None:
    """Let the ranks agree on the scales of all of torchao's float8 weights of a sharded model.

    torchao's ``precompute_float8_dynamic_scale_for_fsdp``, to be called behind ``optimizer.step()``
    and ``mics.load``: one all-reduce for the weights of a mesh in place of one for each weight and
    gather. The ledger counts it, and ``predict_traffic`` takes one call a step from the first on.
    Once it was called, a gather of weights that were written since is refused. torchao's own
    function does the same, uncounted and unchecked. Collective over the ranks of the model.

    Raises:
        ConfigError: the model has no such weights.
    """
    layers = _layers_by_mesh(model)
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no sharded weight of torchao's float8 training.",
            write="convert_to_float8_training(model, config=Float8LinearConfig("
            "enable_fsdp_float8_all_gather=True)) before mics.shard(model)",
        )
    for of_one_mesh in layers:
        _precompute(of_one_mesh)


def _layers_by_mesh(model: nn.Module) -> list[list[nn.Module]]:
    """The modules with weights whose scale can be worked out beforehand, those of a mesh together.

    torchao puts the scales of one call into one tensor, which has one mesh.
    """
    ours = units_by_param()
    found: dict[Any, list[nn.Module]] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if id(weight) in ours and isinstance(weight, DTensor) and compat.scales_beforehand(weight):
            found.setdefault(weight.device_mesh, []).append(module)
    return list(found.values())


def _precompute(layers: list[nn.Module]) -> None:
    torchao: Any = importlib.import_module("torchao.float8")  # whose weights these are
    weights: dict[int, Any] = {id(one.weight): one.weight for one in layers}
    by_param = units_by_param()
    units = [by_param[one] for one in weights]
    for unit in units:
        unit.precomputing = []
    with Seen() as seen:
        torchao.precompute_float8_dynamic_scale_for_fsdp(nn.ModuleList(layers))
    count(messages_of(seen.apart), units[0].ledger, units[0].groups.device)
    units[0].precomputing = _messages(layers)
    for weight, unit in zip(weights.values(), units, strict=True):
        unit.scales.agreed(weight)
    watch(_outdate)


def _outdate(_: torch.optim.Optimizer, stepped: set[int]) -> None:
    """What an optimizer steps has other scales: not every optimizer leaves a trace in a weight."""
    for key, unit in units_by_param().items():
        if key in stepped:
            unit.scales.outdate(key)


def _messages(layers: list[nn.Module]) -> list[Message]:
    """What a call sends: the largest value of each weight, along every axis of their mesh."""
    weights: list[Any] = [one.weight for one in layers]
    mesh, nbytes = weights[0].device_mesh, sum(one.dtype.itemsize for one in weights)
    return [
        Message("all_reduce", StageMessage("flat", ranks_of(mesh.get_group(axis)), nbytes, 1))
        for axis in range(mesh.ndim)
        if any(one.placements[axis].is_shard() for one in weights)
    ]
