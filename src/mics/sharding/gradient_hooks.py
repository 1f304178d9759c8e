"""Hooks on the gradients of parameters: those that would be lost, and those that never run.

FSDP2 replaces parameters by shards, and gives a shard its gradient without autograd. So a hook on a
parameter that is then sharded is gone, and one of ``Tensor.register_hook`` on a shard is never
called: a mask or a scale in it would be left out without a word. Hooks behind accumulation run,
where there are no replicas (``hop_two.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mics import compat
from mics.errors import MicroStepError, ShardError
from mics.quantities import first_of
from mics.sharding.other_axes import unsharded

_BEHIND = "a change of param.grad between backward and optimizer.step(), on every rank"


def refuse_lost_hooks(modules: Sequence[nn.Module], ignored: set[nn.Parameter]) -> None:
    """Refuse to shard parameters that have hooks on their gradients.

    Args:
        modules: what is to be sharded.
        ignored: parameters that are not.

    Raises:
        ShardError: there are such.
    """
    found = unsharded(modules).items()
    names = [name for name, p in found if p not in ignored and compat.num_hooks(p)]
    if names:
        raise ShardError(
            "A hook on the gradient of a parameter would be lost: sharding replaces the parameter.",
            numbers=f"{len(names)} with hooks: {first_of(names)}.",
            write=_BEHIND,
        )


def refuse_idle_hooks(group: Any) -> None:
    """Refuse hooks of ``Tensor.register_hook`` on the shards of a unit.

    Args:
        group: the FSDP2 parameter group.

    Raises:
        MicroStepError: there is one.
    """
    params = compat.sharded_params(group)
    if compat.have_tensor_hooks(params):
        names = compat.param_names(group)
        hooked = [n for n, p in zip(names, params, strict=True) if compat.have_tensor_hooks([p])]
        raise MicroStepError(
            "A hook of Tensor.register_hook on a sharded parameter is never called: its gradient "
            "does not come from autograd.",
            numbers=f"{len(hooked)} with hooks: {first_of(hooked)}.",
            write=_BEHIND,
        )
