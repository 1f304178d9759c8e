"""Whole tensors with one owner each, among all ranks that hold their shards: there and back.

[Note: in packs]
The owner of a tensor is a rank of one replica. Inside of that replica every rank sends each other
one a row of bytes: its parts of all tensors that the other one owns. Back it goes the same way, and
then each rank has its new parts of what its replica owns. Those of the others it gathers from the
ranks that hold the same shard in other replicas, in one message too. Rows are as long as the
longest, and parts begin where any dtype may, so bytes follow from shapes and dtypes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mics.communication.apart import Message
from mics.communication.ledger import Ledger, Span, Untimed
from mics.communication.whole import Split, splits_of
from mics.ranks import issuing
from mics.ranks.mesh import Groups, ranks_of
from mics.traffic import Collective, StageMessage

_ALIGNMENT = 16  # bytes; of the largest dtype


class Owner(NamedTuple):
    """A rank of a mesh: which replica it belongs to, and its place in the partition group."""

    replica: int
    place: int


@dataclass(frozen=True)
class Form:
    """How a tensor lies on a partition group.

    Args:
        shape: of the whole tensor.
        dtype: of it.
        split: over the partition group; ``None`` for one of which every rank has a copy.
    """

    shape: torch.Size
    dtype: torch.dtype
    split: Split | None

    @property
    def nbytes(self) -> int:
        """What a rank's part takes of a row, padded as the longest one's."""
        numel = self._padded().numel() * self.dtype.itemsize
        return -(-numel // _ALIGNMENT) * _ALIGNMENT

    def _padded(self) -> torch.Size:
        """The shape of a rank's part, the split dim first."""
        if self.split is None:
            return self.shape
        rest = [size for dim, size in enumerate(self.shape) if dim != self.split.dim]
        return torch.Size([self.split.longest, *rest])

    def put(self, part: torch.Tensor, row: torch.Tensor) -> None:
        """Write a rank's part into its place, [nbytes]."""
        part = part if self.split is None else part.movedim(self.split.dim, 0)
        place = row[: part.numel() * self.dtype.itemsize].view(self.dtype)
        place.view(part.shape).copy_(part)

    def put_all(self, whole: torch.Tensor, rows: torch.Tensor) -> None:
        """Write the part of every rank of the partition group, [ranks, nbytes]."""
        for place, row in enumerate(rows):
            self.put(self._part(whole, place), row)

    def take(self, row: torch.Tensor, place: int) -> torch.Tensor:
        """The part of the rank at ``place`` of a row; the reverse of ``put``, in its memory."""
        values = row[: self._padded().numel() * self.dtype.itemsize].view(self.dtype)
        padded = values.view(self._padded())
        if self.split is None:
            return padded
        return padded[: self._size(place)].movedim(0, self.split.dim)

    def take_all(self, rows: torch.Tensor) -> torch.Tensor:
        """The whole tensor of the parts of all ranks, [ranks, nbytes]; a copy."""
        if self.split is None:
            return self.take(rows[0], 0).clone()
        numel = self._padded().numel()
        values = rows[:, : numel * self.dtype.itemsize].view(self.dtype)
        whole = values.reshape(-1, *self._padded()[1:])[: self.split.size]
        return whole.movedim(0, self.split.dim).contiguous()

    def _part(self, whole: torch.Tensor, place: int) -> torch.Tensor:
        if self.split is None:
            return whole
        return whole.narrow(self.split.dim, self._first(place), self._size(place))

    def _first(self, place: int) -> int:
        assert self.split is not None
        return min(self.split.size, place * self.split.longest)

    def _size(self, place: int) -> int:
        return self._first(place + 1) - self._first(place)


def form_of(tensor: DTensor, partition: dist.ProcessGroup) -> Form | None:
    """How a tensor lies on a partition group; ``None`` if it is spread over other ranks than these.

    Raises:
        ShardError: it is a sum that is not complete, or split in an order that mics does not know.
    """
    splits = [one for one in splits_of(tensor) if one.ranks > 1]
    if not splits and partition.size() == 1:
        return Form(tensor.shape, tensor.dtype, None)
    if len(splits) != 1:
        return None
    ranks = ranks_of(tensor.device_mesh.get_group(splits[0].axis))
    if ranks != ranks_of(partition):
        return None
    return Form(tensor.shape, tensor.dtype, splits[0])


class Parcel(NamedTuple):
    """A tensor that is sent: who owns it, and how it lies on the ranks of each replica."""

    owner: Owner
    form: Form


class Routes:
    """The ways between owners and all ranks of a mesh.

    Every rank of it gives the same parcels, in the same order.

    Args:
        groups: of the mesh.
        ledger: counts what is sent in hop 0; ``None`` counts nothing.
    """

    def __init__(self, groups: Groups, ledger: Ledger | None) -> None:
        self._groups = groups
        self._ledger = ledger
        self._place = groups.shard.rank()
        self._replica = 0 if groups.replicas is None else groups.replicas.rank()

    @property
    def here(self) -> Owner:
        """This rank."""
        return Owner(self._replica, self._place)

    def to_owners(
        self, parcels: Sequence[Parcel], parts: Sequence[torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Bring parts to their owners. Collective over partition groups.

        Args:
            parcels: what is sent.
            parts: this rank's of each.

        Returns:
            The parts of all ranks, [ranks, bytes], of each parcel that this rank owns, by its
            number; ``Form.take_all`` makes the whole tensor of them.
        """
        inside, width = self._inside(parcels)
        if not inside:
            return {}
        rows = self._rows(width)
        for number, at in inside.items():
            owner, form = parcels[number]
            form.put(parts[number], rows[owner.place, at : at + form.nbytes])
        rows = self._exchange(rows)
        return {
            number: rows[:, at : at + parcels[number].form.nbytes]
            for number, at in inside.items()
            if parcels[number].owner == self.here
        }

    def from_owners(
        self, parcels: Sequence[Parcel], wholes: Mapping[int, torch.Tensor]
    ) -> list[torch.Tensor]:
        """Bring this rank's part of every parcel. Collective over all ranks of the mesh.

        Args:
            parcels: what is sent.
            wholes: those that this rank owns, by their number.

        Returns:
            The parts, in the memory of two buffers.
        """
        inside, width = self._inside(parcels)
        mine: dict[int, torch.Tensor] = {}
        if inside:
            rows = self._rows(width)
            for number, whole in wholes.items():
                at, form = inside[number], parcels[number].form
                form.put_all(whole, rows[:, at : at + form.nbytes])
            rows = self._exchange(rows)
            for number, at in inside.items():
                owner, form = parcels[number]
                mine[number] = rows[owner.place, at : at + form.nbytes]
        if self._groups.replicas is not None:
            mine = self._gather(parcels, mine)
        return [one.form.take(mine[n], self._place) for n, one in enumerate(parcels)]

    def messages(self, to_owners: Sequence[Parcel], from_owners: Sequence[Parcel]) -> list[Message]:
        """What this rank's groups send for these parcels."""
        found = []
        for parcels in (to_owners, from_owners):
            inside, width = self._inside(parcels)
            nbytes = self._groups.shard.size() * width
            if inside and self._groups.shard.size() > 1:
                found.append(_message("all_to_all", self._groups.shard, nbytes))
        if self._groups.replicas is not None:
            _, width = _places(from_owners, lambda owner: owner.replica)
            nbytes = self._groups.replicas.size() * width
            found.append(_message("all_gather", self._groups.replicas, nbytes))
        return found

    def _gather(
        self, parcels: Sequence[Parcel], mine: Mapping[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """This rank's parts of what all replicas own, of those of what its own does."""
        replicas = self._groups.replicas
        assert replicas is not None
        places, width = _places(parcels, lambda owner: owner.replica)
        row = torch.zeros(width, dtype=torch.uint8, device=self._groups.device)
        for number, part in mine.items():
            row[places[number] : places[number] + len(part)] = part
        rows = row.new_empty(replicas.size(), width)
        with self._span(_message("all_gather", replicas, rows.nbytes)):
            issuing.all_gather(rows.view(-1), row, replicas)
        return {
            number: rows[one.owner.replica, places[number] : places[number] + one.form.nbytes]
            for number, one in enumerate(parcels)
        }

    def _inside(self, parcels: Sequence[Parcel]) -> tuple[dict[int, int], int]:
        """Where in its owner's row a parcel of this replica begins, by its number; their length."""
        places, _ = _places(parcels, lambda owner: owner)
        inside = {n: at for n, at in places.items() if parcels[n].owner.replica == self._replica}
        ends = [at + parcels[n].form.nbytes for n, at in inside.items()]
        return inside, max(ends, default=0)

    def _rows(self, width: int) -> torch.Tensor:
        ranks = self._groups.shard.size()
        return torch.zeros(ranks, width, dtype=torch.uint8, device=self._groups.device)

    def _exchange(self, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) == 1:
            return rows
        received = torch.empty_like(rows)
        with self._span(_message("all_to_all", self._groups.shard, rows.nbytes)):
            issuing.exchange(received, rows, self._groups.shard).wait()
        return received

    def _span(self, message: Message) -> Span | Untimed:
        if self._ledger is None:
            return Untimed()
        return self._ledger.issue(0, *message, self._groups.device)


def _places(
    parcels: Sequence[Parcel], row_of: Callable[[Owner], Hashable]
) -> tuple[dict[int, int], int]:
    """Where each parcel begins in the row that it goes into, and how long the longest row is."""
    ends: dict[Hashable, int] = {}
    places = {}
    for number, (owner, form) in enumerate(parcels):
        places[number] = ends.get(row_of(owner), 0)
        ends[row_of(owner)] = places[number] + form.nbytes
    return places, max(ends.values(), default=0)


def _message(collective: Collective, group: dist.ProcessGroup, nbytes: int) -> Message:
    return Message(collective, StageMessage("flat", ranks_of(group), nbytes, 1))
