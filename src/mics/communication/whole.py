"""A whole tensor of its shards, and back: over every axis of its mesh that splits it.

[Note: in which order a tensor is split]
Axes that split one dim split it one after the other, each what those before it left. That is the
order of the mesh, but for FSDP2's: it comes first in the mesh and splits last, what tensor or
expert parallelism have split. ``DTensor`` says so by a placement with a split factor, the number of
pieces that the later axes have made. A whole tensor is gathered the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mics import compat
from mics.communication.apart import Message
from mics.communication.ledger import Ledger, Untimed
from mics.errors import ShardError
from mics.ranks import issuing
from mics.ranks.mesh import device_of, ranks_of
from mics.traffic import StageMessage


@dataclass(frozen=True)
class Split:
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
        splits_of(tensor)


def whole_of(tensor: DTensor, ledger: Ledger | None) -> torch.Tensor:
    """All of a tensor, on every rank of its mesh. Collective over the axes that split it.

    Args:
        tensor: a parameter, its gradient or state, see ``check_splits``.
        ledger: counts the gathers in hop 0; ``None`` counts nothing.
    """
    return wholes_of([tensor], ledger)[0]


def wholes_of(
    tensors: Sequence[DTensor], ledger: Ledger | None, dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """All of several tensors, in as few messages as there are axes and dtypes.

    Collective over the axes that split them; every rank gives the same tensors, in the same order.

    Args:
        tensors: as for ``whole_of``.
        ledger: counts the gathers in hop 0; ``None`` counts nothing.
        dtype: of what is sent and returned, for floating-point tensors; their own by default.
    """
    pieces = [_piece(tensor, dtype) for tensor in tensors]
    left = [_undone(tensor) for tensor in tensors]
    while any(left):
        together: dict[tuple[dist.ProcessGroup, torch.dtype], list[int]] = {}
        for at, splits in enumerate(left):
            if splits:
                group = tensors[at].device_mesh.get_group(splits[0].axis)
                together.setdefault((group, pieces[at].dtype), []).append(at)
        for (group, _), members in together.items():
            splits = [left[at].pop(0) for at in members]
            rows = [pieces[at].movedim(s.dim, 0) for at, s in zip(members, splits, strict=True)]
            for at, whole in zip(members, _gather(rows, splits, group, ledger), strict=True):
                pieces[at] = whole
    return [piece.contiguous() for piece in pieces]


def _piece(tensor: DTensor, dtype: torch.dtype | None) -> torch.Tensor:
    """This rank's part, where and as it is sent."""
    piece = compat.local_of(tensor).detach()
    sent = dtype if dtype is not None and piece.is_floating_point() else piece.dtype
    return piece.to(device_of(tensor.device_mesh), sent)


def _gather(
    rows: list[torch.Tensor],
    splits: list[Split],
    group: dist.ProcessGroup,
    ledger: Ledger | None,
) -> list[torch.Tensor]:
    """Undo one split of each tensor, whose split dims come first in ``rows``, in one message."""
    shapes = [(one.longest, *part.shape[1:]) for one, part in zip(splits, rows, strict=True)]
    numels = [torch.Size(shape).numel() for shape in shapes]
    mine = rows[0].new_zeros(sum(numels))
    for place, shape, part in zip(torch.split(mine, numels), shapes, rows, strict=True):
        place.view(shape)[: len(part)] = part
    out = mine.new_empty(group.size(), len(mine))
    sent = StageMessage("flat", ranks_of(group), out.nbytes, 1)
    span = Untimed() if ledger is None else ledger.issue(0, "all_gather", sent, out.device)
    with span:
        issuing.all_gather(out.view(-1), mine, group)
    return [
        part.reshape(-1, *shape[1:])[: one.size].movedim(0, one.dim)
        for part, shape, one in zip(torch.split(out, numels, dim=1), shapes, splits, strict=True)
    ]


def part_of(whole: torch.Tensor, like: DTensor) -> DTensor:
    """This rank's part of a tensor that every rank has, split as another one; sends nothing."""
    piece = whole
    for split in splits_of(like):
        first = min(split.size, like.device_mesh.get_local_rank(split.axis) * split.longest)
        piece = piece.narrow(split.dim, first, min(split.longest, split.size - first))
    return as_part(piece, like)


def as_part(piece: torch.Tensor, like: DTensor) -> DTensor:
    """This rank's part as the tensor that is split as another one."""
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
    shape = list(compat.local_of(tensor).shape)
    messages = []
    for one in _undone(tensor):
        shape[one.dim] = one.ranks * one.longest
        nbytes = torch.Size(shape).numel() * tensor.dtype.itemsize
        ranks = ranks_of(tensor.device_mesh.get_group(one.axis))
        messages.append(Message("all_gather", StageMessage("flat", ranks, nbytes, 1)))
        shape[one.dim] = one.size
    return messages


def groups_that_split(tensor: DTensor) -> list[dist.ProcessGroup]:
    """The groups over which ``whole_of`` gathers a tensor."""
    return [tensor.device_mesh.get_group(one.axis) for one in _undone(tensor)]


def _undone(tensor: DTensor) -> list[Split]:
    """The splits in the order in which they are undone."""
    return [one for one in reversed(splits_of(tensor)) if one.ranks > 1]


def splits_of(tensor: DTensor) -> list[Split]:
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
        split = Split(axis, dim, shape[dim], mesh.size(axis))
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
