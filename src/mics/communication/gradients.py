"""The gradient shards of one FSDP2 parameter group, and the flat buffer behind them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from mics import compat


def gradients_of(group: Any) -> list[torch.Tensor]:
    """The local shards of the gradients that exist, in group order."""
    return [g for g in trainable_gradients(group) if g is not None]


def trainable_gradients(group: Any) -> list[torch.Tensor | None]:
    """The local shard of every trainable parameter's gradient, in group order."""
    return compat.locals_of([param.grad for param in compat.trainable_params(group)])


def offsets_of(group: Any) -> list[int]:
    """Where each trainable parameter's shard begins in a buffer for all of them, in elements."""
    return [0, *accumulate(compat.trainable_shard_numels(group))][:-1]


def matrices_of(group: Any) -> list[tuple[int, slice]]:
    """Which trainable parameters have two or more dims, and where their shards are.

    Returns:
        The number among the group's parameters, trainable or not, and the elements in a buffer for
        the shards of all trainable ones.
    """
    params = compat.sharded_params(group)
    trainable = [number for number, param in enumerate(params) if param.requires_grad]
    places = zip(trainable, offsets_of(group), compat.trainable_shard_numels(group), strict=True)
    return [(n, slice(at, at + numel)) for n, at, numel in places if params[n].ndim > 1]


def flat_buffer(
    gradients: Sequence[torch.Tensor | None], numels: Sequence[int]
) -> torch.Tensor | None:
    """The buffer that the gradients of all trainable parameters are views of.

    FSDP2 hands out the gradients of one reduction in this way.

    Args:
        gradients: the local shards, as ``trainable_gradients`` says.
        numels: elements of the padded shards.

    Returns:
        [numel of the padded shards]; ``None`` when one has no gradient, or they were offloaded,
        cast, or set by somebody else.
    """
    if not gradients or gradients[0] is None:
        return None
    first, offset = gradients[0], 0
    storage, dtype = first.untyped_storage(), first.dtype
    address = storage.data_ptr()
    for gradient, numel in zip(gradients, numels, strict=True):
        if gradient is None or gradient.dtype != dtype:
            return None
        # Empty shards are views too; what they are must not let a rank answer as no other does.
        elsewhere = gradient.untyped_storage().data_ptr() != address
        if elsewhere or gradient.storage_offset() != offset:
            return None
        offset += numel
    if storage.nbytes() != offset * first.element_size():
        return None
    return first.new_empty(0).set_(storage, 0, (offset,), (1,))


def message_of(group: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One tensor for hop 2: the flat buffer behind the gradients, or a copy of them.

    It is a copy where some have no gradient, see [Note: the same message on every rank] in
    ``hop_two.py``, and where gradients are offloaded or stored in another dtype than the message's.
    """
    gradients = trainable_gradients(group)
    flat = flat_buffer(gradients, compat.trainable_shard_numels(group))
    if flat is not None:
        return flat.to(device=device, dtype=dtype)
    message = torch.zeros(compat.trainable_shard_numel(group), dtype=dtype, device=device)
    for gradient, offset in zip(gradients, offsets_of(group), strict=True):
        if gradient is not None:
            message[offset : offset + gradient.numel()] = gradient.reshape(-1)
    return message


@torch.no_grad()
def add_whole(group: Any) -> None:
    """Add the gradients of a replica of one rank to its shards', as FSDP2 does, by fewer copies.

    The first ones come into one flat buffer, see ``flat_buffer``. ``whole_gradients_are_sums`` of
    ``compat.py`` says for which groups.
    """
    added, shards = compat.take_whole_gradients(group), trainable_gradients(group)
    if all(shard is None for shard in shards):
        numel = compat.trainable_shard_numel(group)
        flat = torch.empty(numel, dtype=compat.reduce_dtype(group), device=added[0].device)
        torch.cat([one.reshape(-1) for one in added], out=flat)
        compat.give_gradients(group, flat)
    else:
        there = [(s, one) for s, one in zip(shards, added, strict=True) if s is not None]
        compat.add_all([shard for shard, _ in there], [one for _, one in there])
        for i, (shard, one) in enumerate(zip(shards, added, strict=True)):
            if shard is None:
                compat.give_gradient(group, i, one.reshape(-1))


def copy_back(
    message: torch.Tensor, gradients: Sequence[torch.Tensor | None], offsets: Sequence[int]
) -> None:
    """Write a copied message back into the gradients."""
    storage = message.untyped_storage().data_ptr()
    for gradient, offset in zip(gradients, offsets, strict=True):
        if gradient is not None and gradient.untyped_storage().data_ptr() != storage:
            gradient.copy_(message[offset : offset + gradient.numel()].view_as(gradient))
