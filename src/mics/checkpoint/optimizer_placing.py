"""Where a tensor of an optimizer will be: sharded like its parameter, replicated or plain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, empty

from mics import compat
from mics.checkpoint.manifest import PLAIN, REPLICATED, Entry
from mics.sharding.tensor_parts import plain_like


@dataclass(frozen=True)
class Home:
    """Where the state of a parameter will be, and what is there already."""

    param: nn.Parameter
    state: Mapping[Any, Any]
    step_on_device: bool

    def place(self, entry: Entry, key: str) -> torch.Tensor:
        """A tensor for an entry: the one in use where it fits, else a new one."""
        mine = self.state.get(key)
        param, dtype = self.param.detach(), entry.torch_dtype
        on_host = key == "step" and not self.step_on_device
        device = torch.device("cpu") if on_host else param.device
        if not isinstance(param, DTensor) or self._is_plain(entry):
            new = torch.empty(entry.shape, dtype=dtype, device=device)
        elif entry.shape == tuple(param.shape) and entry.form != REPLICATED:
            new = plain_like(param, dtype)
        else:
            mesh = param.device_mesh
            new = empty(entry.shape, dtype=dtype, device_mesh=mesh, placements=self._like(entry))
        # One number may serve many parameters, so only what has dims is read in place.
        if isinstance(mine, torch.Tensor) and mine.ndim and _same_kind(mine, new):
            return mine.detach()
        return new

    def _is_plain(self, entry: Entry) -> bool:
        return entry.form == PLAIN or (entry.form == "" and not entry.shape)

    def _like(self, entry: Entry) -> Sequence[Any]:
        """Placements of a tensor that has not the shape of its parameter."""
        assert isinstance(self.param, DTensor)
        everywhere = [Replicate()] * self.param.device_mesh.ndim
        if entry.form in ("", REPLICATED):
            return everywhere
        fits = all(
            isinstance(placement, Replicate)
            or (isinstance(placement, Shard) and placement.dim < len(entry.shape))
            for placement in self.param.placements
        )
        return self.param.placements if fits else everywhere


def _same_kind(one: torch.Tensor, other: torch.Tensor) -> bool:
    # Quantised state says that it has 32 bits, and would round what is read into it.
    if any(type(compat.local_of(tensor.detach())) is not torch.Tensor for tensor in (one, other)):
        return False
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    if isinstance(one, DTensor) and isinstance(other, DTensor):
        return (one.device_mesh, one.placements) == (other.device_mesh, other.placements)
    return not isinstance(one, DTensor) and not isinstance(other, DTensor)
