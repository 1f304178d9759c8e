"""The gradient shards of one FSDP2 parameter group, and the flat buffer behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from mics import compat


def gradients_of(group: Any) -> list[torch.Tensor]:
    """The local shards of the gradients that exist, in group order."""
    with torch.no_grad():
        return [_local(p.grad) for p in compat.sharded_params(group) if p.grad is not None]


def flat_buffer(gradients: Sequence[torch.Tensor], padded_numel: int) -> torch.Tensor | None:
    """The buffer that all of them are views of, as FSDP2 hands out those of one reduction.

    Args:
        gradients: at least one.
        padded_numel: elements of the whole group's padded shard; the buffer has at most as many.

    Returns:
        [numel]; ``None`` when they come from several reductions (the used parameters changed), are
        offloaded, or were cast.
    """
    first = gradients[0]
    storage = first.untyped_storage()
    numel = storage.nbytes() // first.element_size()
    shared = all(
        g.untyped_storage().data_ptr() == storage.data_ptr() and g.dtype == first.dtype
        for g in gradients
    )
    if not shared or not sum(g.numel() for g in gradients) <= numel <= padded_numel:
        return None
    return first.new_empty(0).set_(storage, 0, (numel,), (1,))


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
