"""Optimizer state that the replicas have dealt among them, as all other state is kept, and back.

In a checkpoint it is sharded like its parameter, so that it loads dealt to any number of replicas,
or not dealt. For that each replica has all of its shard's state while it is saved or loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from mics import compat
from mics.communication.shares import Share
from mics.errors import CheckpointError
from mics.ranks.agreement import check_agreement

Owner = tuple[Share, int]
"""A share, and the position of a parameter in it."""


def check_alike(
    owners: Iterable[Owner], states: Sequence[tuple[str, Owner, Mapping[Any, Any]]]
) -> None:
    """Refuse to bring states together that are not alike on all replicas. Collective over them.

    Args:
        owners: of all parameters that an optimizer has, with a state or without.
        states: what this rank has, each with the name of its parameter.

    Raises:
        DisagreementError: on every rank: one has a state that another one has not.
    """
    meshes = {share.replicas: share.device for share, _ in owners}
    for replicas, device in meshes.items():
        lines = [
            f"{name}, {key!r}: {_spelled(value, share.params[at])}"
            for name, (share, at), state in states
            if share.replicas is replicas
            for key, value in state.items()
        ]
        check_agreement({"the state of an optimizer of mics.owned": lines}, [replicas], device)


def _spelled(value: Any, mine: torch.Tensor) -> str:
    """What a state is, in words that are the same whatever a rank owns."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    shape = "one number for each element" if value.shape == mine.shape else list(value.shape)
    return f"{type(value).__name__} of {value.dtype}, {shape if value.ndim else 'one number'}"


def whole_state(owner: Owner, state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The state of a parameter, sharded like it. Collective over the replicas.

    Raises:
        CheckpointError: a tensor of it has neither one element nor those of the owned parameter.
    """
    share, at = owner
    return {key: _whole(share, at, key, value) for key, value in state.items()}


def _whole(share: Share, at: int, key: Any, value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not value.ndim:
        return value
    param, mine = share.sharded(at), share.params[at]
    if value.shape != mine.shape or type(value) is not torch.Tensor:
        raise CheckpointError(
            "State of an optimizer that mics.owned has dealt cannot be kept: it is not one number "
            "for each element.",
            numbers=f"{key} is a {type(value).__name__} of shape {list(value.shape)}, what the "
            f"rank owns has {list(mine.shape)}.",
            write="a checkpoint without the optimizer, or the optimizer of model.parameters()",
        )
    assert isinstance(param, DTensor)
    return DTensor.from_local(
        share.whole(at, value),
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def owned_state(owner: Owner, state: Mapping[Any, Any]) -> dict[Any, Any]:
    """What this rank owns of the state of a parameter; sends nothing."""
    share, at = owner
    return {
        key: share.part(at, compat.local_of(value)) if isinstance(value, DTensor) else value
        for key, value in state.items()
    }
