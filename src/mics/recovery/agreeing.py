"""The questions after each kept step: has every rank it in memory, and are the replicas alike?

Ranks that hold the same shard ask each other first, then one of each shard asks the others: what
all have said reaches everybody in two small exchanges, however many ranks there are. They run on
groups of their own, beside the next step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mics.errors import RecoveryError
from mics.ranks.heartbeat import hold_in
from mics.ranks.issuing import all_gather, all_reduce, make_group
from mics.recovery.holders import Seat


@dataclass(frozen=True)
class Heard:
    """What all ranks have said of a step.

    ``everywhere``: it is in every rank's memory. ``differ``: replicas of some shard, perhaps not
    this rank's, hold other bits. ``digests`` are those of the ranks with this shard that have it,
    and ``owns`` what those ranks have of their own, as JSON.
    """

    everywhere: bool
    differ: bool
    digests: Mapping[int, int]
    owns: Mapping[int, bytes]


class Agreeing:
    """The groups in which ranks ask each other. Collective when made.

    Args:
        seats: of all ranks.
        rank: of this process.
    """

    def __init__(self, seats: Sequence[Seat], rank: int) -> None:
        by_key: defaultdict[str, list[int]] = defaultdict(list)
        for seat in seats:
            by_key[seat.key].append(seat.rank)
        self.holders = by_key[seats[rank].key]
        """The ranks that hold this rank's shard."""
        self._shard: dist.ProcessGroup | None = None
        self._rest: dist.ProcessGroup | None = None
        even = len({len(ranks) for ranks in by_key.values()}) == 1
        hold_in(len(by_key) if even else len(seats))
        if len(seats) == 1:
            return
        place = self.holders.index(rank)
        rest = [ranks[place] for ranks in by_key.values()] if even else range(len(seats))
        # torch names a group by how many a process has made: every rank makes as many, be it alone.
        if any(len(ranks) > 1 for ranks in by_key.values()):
            self._shard = make_group(self.holders, "states of one shard", backend="gloo")
        if len(by_key) > 1:
            self._rest = make_group(sorted(rest), "states of all shards", backend="gloo")

    def ask(self, step: int, digest: int | None, own: bytes) -> Heard:
        """Tell the others what is in this rank's memory, and hear what is in theirs.

        Args:
            step: that this rank has done.
            digest: of the shard; ``None`` where it could not be kept.
            own: what this rank has beside it.

        Raises:
            RecoveryError: on every rank: ranks have done other numbers of steps.
        """
        kept = digest is not None
        mine = torch.tensor([int(kept), digest or 0, len(own), step], dtype=torch.int64)
        rows = mine.unsqueeze(0)
        if self._shard is not None:
            table = torch.empty(len(self.holders) * 4, dtype=torch.int64)
            all_gather(table, mine, self._shard, name="digests of states")
            rows = table.view(-1, 4)
        have = rows[rows[:, 0] == 1]
        differ = len(have) > 0 and bool((have[:, 1] != have[0, 1]).any())
        least, most = int(rows[:, 3].min()), int(rows[:, 3].max())
        trouble = torch.tensor([int(len(have) < len(rows)), int(differ), most, -least])
        if self._rest is not None:
            all_reduce(trouble, dist.ReduceOp.MAX, self._rest, name="verdict on states")
        lacking, differing, most, least = trouble.tolist()
        if most != -least:
            raise RecoveryError(
                "Ranks keep the states of different steps.",
                numbers=f"This rank has done {step} steps, others {-least} to {most}.",
                write="snapshots.keep(step + 1) with the same step on every rank",
            )
        digests = {
            rank: int(row[1])
            for rank, row in zip(self.holders, rows.tolist(), strict=True)
            if row[0] == 1
        }
        owns = self._exchange(own, [int(n) for n in rows[:, 2].tolist()])
        return Heard(not lacking, bool(differing), digests, owns)

    def tell(self, own: bytes) -> dict[int, bytes]:
        """Tell the holders of this shard what this rank has of its own, and hear what they have."""
        if self._shard is None:
            return {self.holders[0]: own}
        sizes = torch.empty(len(self.holders), dtype=torch.int64)
        all_gather(sizes, torch.tensor([len(own)]), self._shard, name="sizes of random states")
        return self._exchange(own, sizes.tolist())

    def _exchange(self, own: bytes, sizes: list[int]) -> dict[int, bytes]:
        """What the holders of this shard have of their own."""
        if self._shard is None:
            return {}
        width = max(sizes)
        mine = torch.zeros(width, dtype=torch.uint8)
        mine[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        memory = bytearray(len(sizes) * width)
        table = torch.frombuffer(memory, dtype=torch.uint8)
        all_gather(table, mine, self._shard, name="random states")
        return {
            rank: bytes(memory[at * width : at * width + num_bytes])
            for at, (rank, num_bytes) in enumerate(zip(self.holders, sizes, strict=True))
        }
