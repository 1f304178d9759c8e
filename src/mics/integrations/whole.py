"""The whole weights of a sharded model, on one rank, as other tools write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from mics.integrations.meeting import meet


def whole_state_dict(
    model: nn.Module, wanted: Callable[[str, torch.Tensor], bool] = lambda name, tensor: True
) -> dict[str, torch.Tensor]:
    """The whole ``state_dict`` of a model, in the host's memory of rank 0.

    Collective over all ranks. One tensor at a time is whole on a device, gathered inside each
    replica. Parameters that are tied are one tensor here too.

    Args:
        model: sharded by mics, or not.
        wanted: of a name and a tensor: whether it is asked for; the same on every rank.

    Returns:
        Tensors by name on rank 0, nothing on the others.

    Raises:
        MicroStepError: between micro-steps.
    """
    meet("a gathering of the whole weights")
    keeps = not dist.is_initialized() or dist.get_rank() == 0
    whole: dict[str, torch.Tensor] = {}
    done: dict[int, torch.Tensor] = {}  # what is tied is one object in several places
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor) or not wanted(name, tensor):
            continue
        if id(tensor) not in done:
            plain = tensor.detach()
            value = plain.full_tensor() if isinstance(plain, DTensor) else plain
            done[id(tensor)] = value.cpu() if keeps else torch.empty(0)
        if keeps:
            whole[name] = done[id(tensor)]
    return whole
