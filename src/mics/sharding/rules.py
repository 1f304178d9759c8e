"""Optimizers whose rule cannot be worked out on shards: refused before their first step.

torch raises too, from inside its kernels and in the middle of a step: some parameters have been
stepped by then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor, Shard

from mics.errors import ShardError
from mics.quantities import first_of


def refuse_rule(optimizer: torch.optim.Optimizer, _: set[int]) -> None:
    """Refuse an optimizer that cannot step a sharded parameter; see ``guard.Watcher``.

    Raises:
        ShardError: on every rank, before anything is changed.
    """
    known = isinstance(optimizer, torch.optim.Adafactor | torch.optim.Rprop | torch.optim.Muon)
    if not known and not _is_transformers_adafactor(optimizer):
        return
    refused = [
        param
        for group in optimizer.param_groups
        for param in group["params"]
        if isinstance(param, DTensor) and _cannot_step(optimizer, group, param)
    ]
    if refused:
        raise _error(optimizer, refused)


def _is_transformers_adafactor(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is the one of transformers, which nothing here imports."""
    names = {(kind.__module__, kind.__name__) for kind in type(optimizer).__mro__}
    return ("transformers.optimization", "Adafactor") in names


def _cannot_step(
    optimizer: torch.optim.Optimizer, group: dict[str, object], param: DTensor
) -> bool:
    if isinstance(optimizer, torch.optim.Muon):
        return any(
            isinstance(placed, Shard) and param.shape[placed.dim] < param.device_mesh.size(axis)
            for axis, placed in enumerate(param.placements)
        )
    is_sharded = not all(placed.is_replicate() for placed in param.placements)
    return is_sharded and not group.get("capturable")


def _error(optimizer: torch.optim.Optimizer, refused: Sequence[DTensor]) -> ShardError:
    whose, name = "torch.optim", type(optimizer).__name__
    if _is_transformers_adafactor(optimizer):
        whose, name = "transformers", "Adafactor"
    shapes = first_of([str(list(param.shape)) for param in refused])
    why = {
        "Adafactor": "takes means over rows and columns of whole matrices, which shards have not.",
        "Muon": "multiplies whole matrices, and torch cannot for those with fewer rows than ranks.",
        "Rprop": "writes by a mask, which torch cannot on a shard.",
    }
    return ShardError(
        f"{whose}.{name} {why[name]}",
        numbers=f"{len(refused)} of its parameters are such: {shapes}.",
        write=f"mics.WholeStep(model.parameters(), {whose}.{name}, ...), which gathers one "
        "matrix at a time inside its partition group",
    )
