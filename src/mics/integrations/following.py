"""Optimizers that were made before their model was sharded, and follow it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mics.errors import ShardError

Place = tuple[nn.Module, str]
"""A module, and the name of a parameter that it holds itself."""


@contextlib.contextmanager
def followed(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """Give optimizers the parameters that stand in the places of theirs when the block ends.

    Tools make the optimizer first. FSDP2 puts other tensors in the places of parameters, which
    optimizers would not know. The old ones are held by nobody meanwhile, so that their memory is
    free as soon as they are sharded.

    Args:
        model: what is sharded inside, in place.
        optimizers: any; parameters of other models stay as they are.

    Raises:
        ShardError: before anything is changed: one has state of the model's parameters, which is
            of whole tensors.
    """
    places = {
        id(param): (module, name)
        for module in model.modules()
        for name, param in module.named_parameters(recurse=False)
    }
    for optimizer in optimizers:
        _refuse_state(optimizer, places)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["params"] = [places.get(id(param), param) for param in group["params"]]
    try:
        yield
    finally:
        for group in groups:
            group["params"] = [_at(place) for place in group["params"]]


def _at(place: Any) -> Any:
    return getattr(place[0], place[1]) if isinstance(place, tuple) else place


def _refuse_state(optimizer: torch.optim.Optimizer, places: dict[int, Place]) -> None:
    known = [param for param in optimizer.state if id(param) in places and optimizer.state[param]]
    if known:
        raise ShardError(
            f"{type(optimizer).__name__} has state of a model that is not sharded yet.",
            numbers=f"It has state of {len(known)} parameter(s).",
            write="accelerator.prepare(model) first, then make the optimizer of "
            "model.parameters(), and prepare it",
        )
