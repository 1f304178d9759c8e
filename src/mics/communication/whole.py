"""A whole tensor of its shards, and back: over every axis of its mesh that splits it.

[Note: in which order a tensor is split]
Axes that split one dim split it one after the other, each what those before it left. That is the
order of the mesh, but for FSDP2's: it comes first in the mesh and splits last, what tensor or
expert parallelism have split. ``DTensor`` says so by a placement with a split factor, the number of
pieces that the later axes have made. A whole tensor is gathered the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from mics import compat
from mics.communication.apart import Message
from mics.communication.ledger import Ledger, Untimed
from mics.errors import ShardError
from mics.ranks import issuing
from mics.ranks.mesh import ranks_of
from mics.traffic import StageMessage


@dataclass(frozen=True)
class _Split:
    """One axis of a mesh that splits a dim.

    Args:
        axis: of the mesh.
        dim: of the tensor.
        size: of the dim, or of the piece of it that this axis splits.
        ranks: of the axis.
    """

    axis: int
    dim: int
    size: int
    ranks: int

    @property
    def longest(self) -> int:
        """The size of the first piece; later ones are padded to it when they are sent."""
        return -(-self.size // self.ranks)


def check_splits(tensor: torch.Tensor) -> None:
    """Refuse a tensor that cannot be gathered; sends nothing.

    Raises:
        ShardError: it is a sum that is not complete, or split in an order that mics does not know.
    """
    if isinstance(tensor, DTensor):
        _splits(tensor)


def whole_of(tensor: DTensor, ledger: Ledger | None) -> torch.Tensor:
    """All of a tensor, on every rank of its mesh. Collective over the axes that split it.

    Args:
        tensor: a parameter, its gradient or state, see ``check_splits``.
        ledger: counts the gathers in hop 0; ``None`` counts nothing.
    """
    piece = compat.local_of(tensor).detach()
    for split, sent in zip(*_gathers(tensor), strict=True):
        rows = piece.movedim(split.dim, 0)
        mine = rows.new_zeros(split.longest, *rows.shape[1:])
        mine[: len(rows)] = rows
        out = mine.new_empty(split.ranks * split.longest, *rows.shape[1:])
        span = Untimed() if ledger is None else ledger.issue(0, "all_gather", sent, out.device)
        with span:
            group = tensor.device_mesh.get_group(split.axis)
            issuing.all_gather(out.view(-1), mine.view(-1), group)
        piece = out[: split.size].movedim(0, split.dim)
    return piece.contiguous()


def part_of(whole: torch.Tensor, like: DTensor) -> DTensor:
    """This rank's part of a tensor that every rank has, split as another one; sends nothing."""
    piece = whole
    for split in _splits(like):
        first = min(split.size, like.device_mesh.get_local_rank(split.axis) * split.longest)
        piece = piece.narrow(split.dim, first, min(split.longest, split.size - first))
    return DTensor.from_local(
        piece,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def messages_for(tensor: torch.Tensor) -> list[Message]:
    """What ``whole_of`` sends of a tensor; nothing of one that is whole."""
    if not isinstance(tensor, DTensor):
        return []
    return [Message("all_gather", sent) for sent in _gathers(tensor)[1]]


def _gathers(tensor: DTensor) -> tuple[list[_Split], list[StageMessage]]:
    """The splits in the order in which they are undone, and the message of each."""
    splits = [one for one in reversed(_splits(tensor)) if one.ranks > 1]
    shape = list(compat.local_of(tensor).shape)
    messages = []
    for one in splits:
        shape[one.dim] = one.ranks * one.longest
        nbytes = torch.Size(shape).numel() * tensor.dtype.itemsize
        ranks = ranks_of(tensor.device_mesh.get_group(one.axis))
        messages.append(StageMessage("flat", ranks, nbytes, 1))
        shape[one.dim] = one.size
    return splits, messages


def _splits(tensor: DTensor) -> list[_Split]:
    """How a tensor is split, first axis first, see [Note: in which order a tensor is split]."""
    mesh, shape = tensor.device_mesh, list(tensor.shape)
    in_order: list[tuple[int, int]] = []
    last: list[tuple[int, int]] = []
    for axis, placed in enumerate(tensor.placements):
        if placed.is_replicate():
            continue
        dim, factor = compat.split_of(placed)
        after = [
            mesh.size(later)
            for later in range(axis + 1, mesh.ndim)
            if compat.split_of(tensor.placements[later])[0] == dim
        ]
        if dim is None or factor not in (1, torch.Size(after).numel()):
            raise _error(tensor)
        (in_order if factor == 1 else last).append((axis, dim))
    found = []
    for axis, dim in in_order + last:
        split = _Split(axis, dim, shape[dim], mesh.size(axis))
        first = min(split.size, mesh.get_local_rank(axis) * split.longest)
        shape[dim] = min(split.longest, split.size - first)
        found.append(split)
    return found


def _error(tensor: DTensor) -> ShardError:
    return ShardError(
        "A tensor cannot be gathered whole: it is a sum that is not complete, or its pieces are in "
        "an order that mics does not know.",
        numbers=f"Shape {list(tensor.shape)}, placements {list(tensor.placements)} on a mesh of "
        f"{list(tensor.device_mesh.shape)} ranks.",
        write="parameters as tensor parallelism (ColwiseParallel, RowwiseParallel) or Shard make "
        "them, then mics.shard(model)",
    )
